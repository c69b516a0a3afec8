# SPDX-License-Identifier: Apache-2.0
"""Keeps a peer from filling the disk with lines about itself."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable


class RateLimitFilter(logging.Filter):
    """Lets a burst of lines pass, then few a second; errors pass always.

    Args:
        burst: Lines that pass at once.
        per_s: Lines a second after that.
        clock: Seconds that never go back.
    """

    def __init__(
        self, burst: int, per_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._burst = burst
        self._per_s = per_s
        self._allowance = float(burst)
        self._clock = clock
        self._last = clock()
        self._num_dropped = 0
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for a line to write; the first after a gap counts the dropped."""
        if record.levelno >= logging.ERROR:
            return True
        with self._lock:
            now = self._clock()
            refill = (now - self._last) * self._per_s
            self._allowance = min(self._burst, self._allowance + refill)
            self._last = now
            if self._allowance < 1:
                self._num_dropped += 1
                return False
            self._allowance -= 1
            dropped, self._num_dropped = self._num_dropped, 0
        if dropped:
            record.msg = (
                f"{record.getMessage()} ({dropped:,} lines before were dropped)"
            )
            record.args = ()
        return True
