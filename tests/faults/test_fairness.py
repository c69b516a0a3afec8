# SPDX-License-Identifier: Apache-2.0
"""A session with long contexts and a full queue beside one with short ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from node_process import NodeProcess
from paged_batch import PagedBatch
from raw_session import RawSession, as_bytes, make_geometry

from vllm_attn_offload.protocol.frames import FrameKind
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.step import StepMetadata

BLOCK_SIZE, NUM_BLOCKS = 1024, 64
#: Requests of the greedy session, all over the same 64k tokens.
NUM_REQS = 4
NUM_QUEUED, NUM_SMALL = 40, 10


class GreedySession:
    """Has up to `NUM_QUEUED` layers in line, and sends more as they are served."""

    def __init__(self, address: str) -> None:
        geometry = make_geometry(block_size=BLOCK_SIZE, num_layers=1)
        self.session = RawSession(address, geometry, NUM_BLOCKS)
        step = StepMetadata.whole(
            query_start_loc=np.arange(NUM_REQS + 1, dtype=np.int32),
            seq_lens=np.full(NUM_REQS, NUM_BLOCKS * BLOCK_SIZE, np.int32),
            slot_mapping=np.full(NUM_REQS, -1),
            block_table=np.tile(np.arange(NUM_BLOCKS, dtype=np.int32), (NUM_REQS, 1)),
        )
        self.session.send_step(step)
        self._qkv = torch.zeros(NUM_REQS, (9 + 3 + 3) * 64)
        self._num_sent = self._num_received = 0

    @property
    def num_queued(self) -> int:
        """Layers that the node has not served."""
        return self._num_sent - self.num_served()

    def num_served(self) -> int:
        """Layers that the node has served."""
        return counters(self.session, NUM_BLOCKS).num_layer_calls

    def fill_up(self) -> None:
        """Read the answers that there are, and send a layer for each."""
        self._receive(self.num_served())
        header = self.session.layer_header(0, self._qkv)
        while self._num_sent < self._num_received + NUM_QUEUED:
            self.session.send(header, as_bytes(self._qkv))
            self._num_sent += 1

    def close(self) -> None:
        """Read what is left, and leave."""
        self._receive(self._num_sent)
        self.session.close()

    def _receive(self, until: int) -> None:
        while self._num_received < until:
            assert self.session.receive()[0] == FrameKind.OUT
            self._num_received += 1


@pytest.fixture
def greedy(node: NodeProcess) -> Iterator[GreedySession]:
    with closing(GreedySession(node.address)) as session:
        yield session


def counters(session: RawSession, num_blocks: int) -> SessionCounters:
    """Counters of the one session on the node with a pool of this size."""
    sessions = session.control.stats().sessions
    return next(s.counters for s in sessions if s.num_blocks == num_blocks)


def test_a_layer_waits_for_one_of_the_neighbour(
    node: NodeProcess, greedy: GreedySession
) -> None:
    """Counted: layers of the greedy session that pass before each of the small one."""
    passed: list[int] = []
    with closing(RawSession(node.address, make_geometry(), 8)) as small:
        step, qkv = PagedBatch(small.geometry, 8, 1).grow([1])
        small.send_step(step)
        while len(passed) < NUM_SMALL:
            greedy.fill_up()
            before = greedy.num_served()
            small.attend(0, qkv)
            # Else this host was too slow to keep the queue filled.
            if greedy.num_queued:
                passed.append(greedy.num_served() - before)
        assert counters(small, 8).queue_s > 0
    # A layer waits for a slice of the one under way, and not for all of it. More pass
    # only where this process has to wait for a CPU.
    assert statistics.median(passed) <= 1
