# SPDX-License-Identifier: Apache-2.0
"""A session that decodes one request, one token a step."""

from __future__ import annotations

import torch
from paged_batch import PagedBatch
from raw_session import RawSession, make_geometry

NUM_BLOCKS = 256


class SteadyWorker:
    """A worker of an engine of its own, on one memory node.

    Args:
        address: The node.
    """

    def __init__(self, address: str) -> None:
        geometry = make_geometry()
        self._batch = PagedBatch(geometry, NUM_BLOCKS, num_reqs=1)
        self._session = RawSession(address, geometry, NUM_BLOCKS)

    def step(self) -> None:
        """Attend in both layers to one token more than before."""
        step, qkv = self._batch.grow([1])
        self._session.send_step(step)
        for layer in range(2):
            out, _ = self._session.attend(layer, qkv)
            assert not torch.isnan(out).any()

    def close(self) -> None:
        """End the session."""
        self._session.close()
