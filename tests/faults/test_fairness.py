# SPDX-License-Identifier: Apache-2.0
"""A session with long contexts and a full queue beside one with short ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from node_process import NodeProcess, eventually
from paged_batch import PagedBatch
from raw_session import RawSession, make_geometry

from vllm_attn_offload.protocol.frames import FrameKind
from vllm_attn_offload.protocol.messages import SessionStats
from vllm_attn_offload.protocol.step import StepMetadata

BLOCK_SIZE, NUM_BLOCKS = 1024, 64
NUM_LAYERS = 40


@pytest.fixture
def greedy(node: NodeProcess) -> Iterator[RawSession]:
    """Has sent 40 layers over 64k tokens, and reads no answer before the test ends."""
    geometry = make_geometry(block_size=BLOCK_SIZE, num_layers=1)
    with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
        step = StepMetadata(
            query_start_loc=np.array([0, 1], np.int32),
            seq_lens=np.array([NUM_BLOCKS * BLOCK_SIZE], np.int32),
            slot_mapping=np.array([-1]),
            block_table=np.arange(NUM_BLOCKS, dtype=np.int32)[None],
        )
        session.send_step(step)
        qkv = torch.zeros(1, (9 + 3 + 3) * 64)
        header = session.layer_header(0, qkv)
        for _ in range(NUM_LAYERS):
            session.send(header, qkv.view(torch.uint8).numpy().data.cast("B"))
        yield session
        kinds = [session.receive()[0] for _ in range(NUM_LAYERS)]
        assert kinds == NUM_LAYERS * [FrameKind.OUT]


def counters(session: RawSession, num_blocks: int) -> SessionStats:
    """Of the one session on the node with a pool of this size."""
    sessions = session.control.stats().sessions
    return next(stats for stats in sessions if stats.num_blocks == num_blocks)


def test_a_layer_waits_for_one_of_the_neighbour(
    node: NodeProcess, greedy: RawSession
) -> None:
    """Counted: layers of the greedy session that pass before those of the small one."""
    num_small = 10
    with closing(RawSession(node.address, make_geometry(), 8)) as small:
        step, qkv = PagedBatch(small.geometry, 8, 1).grow([1])
        small.send_step(step)

        def num_served() -> int:
            return counters(greedy, NUM_BLOCKS).num_layer_calls

        assert eventually(lambda: num_served() >= 1, 30)
        before = num_served()
        for _ in range(num_small):
            small.attend(0, qkv)
        passed = num_served() - before
        assert counters(small, 8).queue_s > 0
    # The one under way when a layer is asked for, and one that begins before the next
    # is sent.
    assert 0 < passed <= 2 * num_small < NUM_LAYERS
