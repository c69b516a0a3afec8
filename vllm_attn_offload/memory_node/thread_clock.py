# SPDX-License-Identifier: Apache-2.0
"""CPU time of a thread that others ask for."""

from __future__ import annotations

import contextlib
import threading
import time


class ThreadClock:
    """CPU time of the thread that called ``start``, which pays nothing for it."""

    def __init__(self) -> None:
        self._clock: int | None = None
        self._ended_s = 0.0

    def start(self) -> None:
        """Show the calling thread's time, with what it has used already."""
        self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def stop(self) -> None:
        """Keep the time of the calling thread, which started the clock and ends."""
        self._ended_s, self._clock = time.thread_time(), None

    @property
    def cpu_s(self) -> float:
        """Seconds until now, or until the thread stopped the clock."""
        clock = self._clock
        if clock is not None:
            with contextlib.suppress(OSError):  # it has just ended
                return time.clock_gettime(clock)
        return self._ended_s
