# SPDX-License-Identifier: Apache-2.0
"""A lock that is handed over in the order in which it was asked for."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """Lets one thread at a time compute, first come first served.

    A plain lock goes to whoever runs when it is released, and that is the session that
    just used it: its next layer would overtake those who wait. Here ``release`` gives
    the lock to the first in line, so that nobody waits for more than one turn of each
    of the others.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._line: deque[threading.Lock] = deque()
        self._is_taken = False

    @property
    def num_waiting(self) -> int:
        """Threads in line."""
        return len(self._line)

    def acquire(self) -> None:
        """Wait for a turn."""
        with self._guard:
            if not self._is_taken:
                self._is_taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._line.append(turn)
        turn.acquire()

    def release(self) -> None:
        """End the turn; the next in line has it already when this returns."""
        with self._guard:
            if self._line:
                self._line.popleft().release()
            else:
                self._is_taken = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()
