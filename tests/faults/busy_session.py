# SPDX-License-Identifier: Apache-2.0
"""A worker that keeps attending and checks every output while others misbehave."""

from __future__ import annotations

import threading

import torch
from paged_batch import PagedBatch, max_error
from raw_session import RawSession, make_geometry

NUM_BLOCKS = 64
MAX_TOKENS = 1000


class BusySession:
    """Decodes in a thread of its own until it is stopped.

    Args:
        address: The memory node.
    """

    def __init__(self, address: str) -> None:
        self._geometry = make_geometry()
        self._session = RawSession(address, self._geometry, NUM_BLOCKS)
        self._is_over = threading.Event()
        self._error: Exception | None = None
        self.num_steps = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the session.

        Raises:
            Exception: What went wrong in between; a wrong output, too.
        """
        self._is_over.set()
        self._thread.join(30)
        self._session.close()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                self._decode_requests()
        except Exception as error:
            self._error = error

    def _decode_requests(self) -> None:
        batch = PagedBatch(self._geometry, NUM_BLOCKS, 2, seed=self.num_steps)
        for num_new in ([37, 5], *([1, 1] for _ in range(MAX_TOKENS))):
            if self._is_over.is_set():
                return
            step, qkv = batch.grow(num_new)
            self._session.send_step(step)
            outs = [self._session.attend(layer, qkv)[0] for layer in (0, 1)]
            exact, _ = batch.expected(torch.float64)
            worst = max(max_error(out, exact) for out in outs)
            if worst > 1e-4:
                raise AssertionError(f"an output is off by {worst}")
            self.num_steps += 1
            self._is_over.wait(0.01)
            if self.num_steps % 100 == 0:
                return
