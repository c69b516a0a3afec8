# SPDX-License-Identifier: Apache-2.0
"""CPU numbers as ``taskset`` writes them."""

from __future__ import annotations

import re

_PART = re.compile(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*")


def parse_cpu_list(text: str) -> list[int]:
    """Read ``0-3,8``, in its order.

    Raises:
        ValueError: It is no such list, or a range of it has no CPUs.
    """
    cpus: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        numbers = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        if not numbers:
            raise ValueError(
                f"{text!r} is not a list of CPUs. Allowed: CPU numbers and ranges of "
                "them. Write for example 8-15 or 0,2."
            )
        cpus += numbers
    return cpus
