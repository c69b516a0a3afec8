# SPDX-License-Identifier: Apache-2.0
"""The micro-batch that holds the baton computes; the other one waits."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Baton:
    """Lets the two micro-batches of a step compute in turns, layer by layer.

    A micro-batch passes the baton on when it has sent its q, k, v, and waits for its
    attention only when it holds the baton again. Nobody else could use the device then,
    so a wait may spin, and at most one thread of the process is runnable. FairLock
    alternate strictly: all ranks of an engine issue their collectives in one order.

    There is no deadline: whoever holds the baton computes, or waits for a memory node
    with a deadline.

    Args:
        enter: Given a micro-batch, puts what vLLM keeps once per process in its state.
    """

    def __init__(self, enter: Callable[[int], None]) -> None:
        self._enter = enter
        self._turns = (threading.Lock(), threading.Lock())
        self._turns[1].acquire()
        self._is_done = [False, False]

    def take(self, micro_batch: int) -> None:
        """Wait for the baton; micro-batch 0 has it first."""
        self._turns[micro_batch].acquire()
        self._enter(micro_batch)

    def pass_on(self, micro_batch: int) -> None:
        """Let the other micro-batch compute; returns when the baton is back."""
        other = 1 - micro_batch
        if not self._is_done[other]:
            self._turns[other].release()
            self.take(micro_batch)

    def finish(self, micro_batch: int) -> None:
        """Pass the baton on for good."""
        other = 1 - micro_batch
        self._is_done[micro_batch] = True
        if not self._is_done[other]:
            self._turns[other].release()
