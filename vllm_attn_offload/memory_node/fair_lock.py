# SPDX-License-Identifier: Apache-2.0
"""A lock that engines take in turns, however many sessions they have."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import AbstractContextManager

from vllm_attn_offload.native.turns import create_turn


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
        self._turn = create_turn()

    @property
    def num_waiting(self) -> int:
        """Threads in line."""
        with self._guard:
            return sum(map(len, self._line.values()))

    def turns_of(self, engine: str) -> Turns:
        """Return the context of every turn of an engine; any thread may enter it.

        The next in line has the lock already when it is left.
        """
        return Turns(self, engine)


class Turns(AbstractContextManager[None]):
    """The turns of one engine.

    Attributes:
        address: Of the word that C code takes and leaves while nobody waits
            (`native/turns.py`); 0: there is none.
    """

    # Entered once per layer: the lock's own fields, and no call in between.
    def __init__(self, lock: FairLock, engine: str) -> None:
        self._lock = lock
        self._engine = engine
        self.address = lock._turn.address

    def __enter__(self) -> None:
        lock = self._lock
        with lock._guard:
            if lock._turn.take_or_ask():
                return
            turn = threading.Lock()
            turn.acquire()
            lock._line.setdefault(self._engine, deque()).append(turn)
        turn.acquire()

    def __exit__(self, *exception: object) -> None:
        self.leave()

    def leave(self) -> None:
        """End a turn, also one that C code has taken."""
        lock = self._lock
        with lock._guard:
            if not lock._line:
                lock._turn.end()
                return
            engine = next(iter(lock._line))
            sessions = lock._line.pop(engine)
            first = sessions.popleft()
            if sessions:
                lock._line[engine] = sessions
            lock._turn.pass_on(is_wanted=bool(lock._line))
            first.release()
