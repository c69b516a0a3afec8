# SPDX-License-Identifier: Apache-2.0
"""Counts how often the kernel had to give this process a page, or to read one."""

from __future__ import annotations

import resource


class PageFaults:
    """Page faults of all threads of this process since the object was made."""

    def __init__(self) -> None:
        self._before = _now()

    @property
    def minor(self) -> int:
        """Pages that were touched for the first time, or mapped again."""
        return _now()[0] - self._before[0]

    @property
    def major(self) -> int:
        """Pages that came from a disk: swapped out, or of a file."""
        return _now()[1] - self._before[1]


def _now() -> tuple[int, int]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt
