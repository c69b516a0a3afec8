# SPDX-License-Identifier: Apache-2.0
"""CPU numbers as ``taskset`` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def format_cpu_list(cpus: Iterable[int]) -> str:
    """Write CPUs in their order, with ranges for runs: ``0-3,8``."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and runs[-1][-1] == cpu - 1:
            runs[-1][1:] = [cpu]
        else:
            runs.append([cpu])
    return ",".join("-".join(map(str, run)) for run in runs)
