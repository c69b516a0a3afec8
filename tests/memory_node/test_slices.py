# SPDX-License-Identifier: Apache-2.0
"""A long LAYER lets others compute in between, and ends with its session or node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from node_process import NodeProcess, eventually, running_node
from paged_batch import PagedBatch, max_error
from raw_session import RawSession, as_bytes, make_geometry

from vllm_attn_offload.memory_node.session_pool import SLICE_S
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.step import StepMetadata

LONG = make_geometry(num_layers=1)
#: 65,536 tokens, whose memory is never written.
NUM_BLOCKS = 4096
NUM_ROWS = 2048


@pytest.fixture(params=["cpp", "torch"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NodeProcess]:
    with running_node(
        tmp_path,
        *("--attention-kernel", request.param, "--kv-cache-gib", "0.25"),
        *("--cpus", str(max(os.sched_getaffinity(0)))),
    ) as process:
        yield process


@pytest.fixture
def long_layer(node: NodeProcess) -> Iterator[RawSession]:
    """A session whose LAYER takes many seconds, and is under way."""
    with closing(
        RawSession(node.address, LONG, NUM_BLOCKS, max_blocks_per_req=4096)
    ) as (session):
        session.send_step(
            StepMetadata.whole(
                query_start_loc=np.array([0, NUM_ROWS], np.int32),
                seq_lens=np.array([16 * NUM_BLOCKS], np.int32),
                slot_mapping=np.full(NUM_ROWS, -1, np.int64),
                block_table=np.arange(NUM_BLOCKS, dtype=np.int32)[None],
            )
        )
        qkv = torch.zeros(NUM_ROWS, (9 + 3 + 3) * 64)
        session.send(session.layer_header(0, qkv), as_bytes(qkv))
        assert eventually(lambda: counters(session).attend_s > 0, timeout_s=60)
        yield session


def counters(session: RawSession) -> SessionCounters:
    return session.control.stats().sessions[0].counters


def test_others_compute_in_between(node: NodeProcess, long_layer: RawSession) -> None:
    geometry = make_geometry()
    batch = PagedBatch(geometry, 16, 2)
    with closing(RawSession(node.address, geometry, 16)) as small:
        for num_new in ([37, 5], *3 * [[1, 1]]):
            step, qkv = batch.grow(num_new)
            small.send_step(step)
            exact, _ = batch.expected(torch.float64)
            for layer in (0, 1):
                out, _ = small.attend(layer, qkv)
                assert max_error(out, exact) < 1e-5
    assert not has_answered(long_layer)


def test_a_closed_session_ends_its_layer(
    node: NodeProcess, long_layer: RawSession
) -> None:
    long_layer.control.close_session(long_layer.reservation)
    with pytest.raises(OSError, match="closed"):
        long_layer.receive()


def test_a_closed_data_channel_ends_its_layer(
    node: NodeProcess, long_layer: RawSession
) -> None:
    """The worker is gone, and its engine's control connection is not."""
    long_layer.transport.close()
    assert eventually(lambda: "in the middle of a layer" in node.log(), timeout_s=60)


def test_a_stopping_node_ends_a_layer(
    node: NodeProcess, long_layer: RawSession
) -> None:
    node.process.terminate()
    with pytest.raises(OSError, match="closed"):
        long_layer.receive()
    assert node.process.wait(30) == 0


def test_a_slice_at_a_time_is_exact(node: NodeProcess) -> None:
    """A prefill chunk that takes several slices."""
    geometry = make_geometry(num_layers=1)
    batch = PagedBatch(geometry, 100, 1)
    raw = RawSession(node.address, geometry, 100, max_blocks_per_req=100)
    with closing(raw) as session:
        for num_new in ([600], [600], [400]):
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            out, _ = session.attend(0, qkv)
        exact, _ = batch.expected(torch.float64)
        assert max_error(out, exact) < 1e-5
        assert counters(session).attend_s > SLICE_S


def has_answered(session: RawSession) -> bool:
    return session.has_reply(timeout_s=0)
