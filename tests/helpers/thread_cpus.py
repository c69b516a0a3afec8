# SPDX-License-Identifier: Apache-2.0
"""On which CPUs threads of a process may run."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil


def thread_cpus(pid: int) -> dict[int, set[int]]:
    """CPUs of each thread of a process, by its id."""
    found = {}
    for each in psutil.Process(pid).threads():
        with suppress(ProcessLookupError):  # It has just ended.
            found[each.id] = os.sched_getaffinity(each.id)
    return found
