# SPDX-License-Identifier: Apache-2.0
"""Decides if a wait may spin: never on a CPU that a working thread could use."""

from __future__ import annotations

import os
from pathlib import Path

#: Longest spin before a wait blocks. A blocked wait costs about 30 us to wake up.
SPIN_US = 100


def spin_us(
    cpu_ids: set[int], num_threads: int, peer_cpu_ids: set[int], peer_num_threads: int
) -> int:
    """Return the spin of both sides of a channel on one host, in microseconds.

    While one side spins, the other works with all its threads.
    """
    num_busy = max(num_threads, peer_num_threads) + 1
    return SPIN_US if len(cpu_ids | peer_cpu_ids) >= num_busy else 0


def remote_spin_us(cpu_ids: set[int]) -> int:
    """Return the spin of a side with a peer on another host, in microseconds."""
    return SPIN_US if len(cpu_ids) > 1 else 0


def process_cpu_ids() -> set[int]:
    """Return the CPUs of the calling thread and of its team.

    A thread that is pinned (one CPU per OpenMP thread) counts with all threads that
    are pinned as narrowly.
    """
    own = os.sched_getaffinity(0)
    cpu_ids = set(own)
    for task in Path("/proc/self/task").iterdir():
        try:
            others = os.sched_getaffinity(int(task.name))
        except OSError:
            continue  # the thread has just ended
        if len(others) <= len(own):
            cpu_ids |= others
    return cpu_ids
