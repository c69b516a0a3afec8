# SPDX-License-Identifier: Apache-2.0
"""A lock that engines take in turns, however many sessions they have."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import AbstractContextManager


class FairLock:
    """Lets one thread at a time compute, engine by engine.

    A plain lock goes to whoever runs when it is released, and that is the session that
    just used it: its next layer would overtake those who wait. Here it goes to the
    engine that waited for longest, and of its sessions to the first in line, so that
    nobody waits for more than one turn of each other engine, and for those of its own.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        # Engines in line, each with its sessions in line.
        self._line: dict[str, deque[threading.Lock]] = {}
        self._is_taken = False

    @property
    def num_waiting(self) -> int:
        """Threads in line."""
        with self._guard:
            return sum(map(len, self._line.values()))

    def turns_of(self, engine: str) -> AbstractContextManager[None]:
        """Return the context of every turn of an engine; any thread may enter it.

        The next in line has the lock already when it is left.
        """
        return _Turns(self, engine)


class _Turns(AbstractContextManager[None]):
    # Entered once per layer: the lock's own fields, and no call in between.
    def __init__(self, lock: FairLock, engine: str) -> None:
        self._lock = lock
        self._engine = engine

    def __enter__(self) -> None:
        lock = self._lock
        with lock._guard:
            if not lock._is_taken:
                lock._is_taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            lock._line.setdefault(self._engine, deque()).append(turn)
        turn.acquire()

    def __exit__(self, *exception: object) -> None:
        lock = self._lock
        with lock._guard:
            if not lock._line:
                lock._is_taken = False
                return
            engine = next(iter(lock._line))
            sessions = lock._line.pop(engine)
            sessions.popleft().release()
            if sessions:
                lock._line[engine] = sessions
