# SPDX-License-Identifier: Apache-2.0
"""Layers that a node serves in C, through shared memory, and those that it does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from micro_batches import assert_micro_batches_are_exact
from node_process import NodeProcess, eventually, running_node
from paged_batch import TORCH_DTYPES, PagedBatch, max_error
from raw_session import RawSession, as_bytes, make_geometry
from thread_cpus import thread_cpus

from vllm_attn_offload.native.channel import load_channels
from vllm_attn_offload.protocol.frames import FrameFlag, FrameKind
from vllm_attn_offload.protocol.geometry import Dtype
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.step import StepMetadata

pytestmark = pytest.mark.skipif(
    load_channels() is None, reason="the C library is not built"
)

NUM_BLOCKS = 64
STEPS = [[40, 3, 1], [25, 1, 1], [1, 1, 1], [1, 17, 1], [1, 1, 1]]
LONG_BLOCKS = 4096


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(
        tmp_path_factory.mktemp("node"),
        *("--attention-kernel", "cpp", "--kv-cache-gib", "0.5"),
    ) as process:
        yield process


def counters(session: RawSession) -> SessionCounters:
    sessions = session.control.stats().sessions
    return next(s.counters for s in sessions if s.num_blocks == session.num_blocks)


def in_interpreter_s(found: SessionCounters) -> float:
    """Only the interpreter times these two, and each of its layers has some of both."""
    return found.queue_s + found.receive_s


@pytest.mark.parametrize("want_lse", [False, True], ids=["output", "with LSE"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_layers_are_exact(node: NodeProcess, dtype: Dtype, want_lse: bool) -> None:
    """Every slot outside the requests' own tokens holds NaN."""
    geometry = make_geometry(dtype=dtype)
    batch = PagedBatch(geometry, NUM_BLOCKS, 3)
    eps = torch.finfo(TORCH_DTYPES[dtype]).eps
    with closing(
        RawSession(node.address, geometry, NUM_BLOCKS, is_shared=True)
    ) as session:
        step, nans = batch.poison(NUM_BLOCKS)
        session.send_step(step)
        for layer in (0, 1):
            assert session.attend(layer, nans)[0].isnan().all()
        before = counters(session)
        received = sent = 0
        for num_new in STEPS:
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            exact, exact_lse = batch.expected(torch.float64)
            for layer in (0, 1):
                out, lse = session.attend(layer, qkv, want_lse=want_lse)
                torch.testing.assert_close(
                    out.double(), exact, atol=4e-6 + eps, rtol=eps
                )
                received += qkv.nbytes
                sent += out.nbytes
                if lse is not None:
                    assert max_error(lse, exact_lse) < 3e-6
                    sent += lse.nbytes
        found = counters(session)
    assert in_interpreter_s(found) == in_interpreter_s(before)
    assert found.num_layer_calls == 2 * (1 + len(STEPS))
    assert found.bytes_sent - before.bytes_sent == sent
    assert found.bytes_received - before.bytes_received > received
    assert 0 < found.attend_s + found.store_s < found.layer_s


def test_micro_batches_are_exact(node: NodeProcess) -> None:
    steps = [[40, 7], [1, 1], [30, 1], [1, 1]]
    assert_micro_batches_are_exact(node.address, steps, is_shared=True)


@pytest.mark.parametrize("is_shared", [False, True], ids=["socket", "shared memory"])
def test_micro_batches_on_half_of_the_cpus(node: NodeProcess, is_shared: bool) -> None:
    steps = [[40, 7], [1, 1], [30, 1], [1, 1]]
    flags = FrameFlag.ON_HALF
    assert_micro_batches_are_exact(
        node.address, steps, is_shared=is_shared, flags=flags
    )


@pytest.mark.parametrize("is_shared", [False, True], ids=["socket", "shared memory"])
def test_half_of_the_cpus(node: NodeProcess, is_shared: bool) -> None:
    """A session's thread leaves the first half to its worker, and comes back.

    That of a worker which may be on another host stays where it is.
    """
    geometry = make_geometry()
    batch = PagedBatch(geometry, NUM_BLOCKS, 2)
    found = []
    with closing(
        RawSession(node.address, geometry, NUM_BLOCKS, is_shared=is_shared)
    ) as session:
        for flags in (FrameFlag.NONE, FrameFlag.ON_HALF, FrameFlag.NONE):
            step, qkv = batch.grow([1, 1])
            session.send_step(step, flags=flags)
            exact, _ = batch.expected(torch.float64)
            for layer in (0, 1):
                assert max_error(session.attend(layer, qkv)[0], exact) < 1e-5
            found.append(thread_cpus(session.control.info.pid))
    before, on_half, after = found
    cpus = sorted(os.sched_getaffinity(session.control.info.pid))
    half = set(cpus[len(cpus) // 2 :])
    # Threads of sessions before may end meanwhile.
    stayed = before.keys() & on_half.keys() & after.keys()
    moved = [on_half[each] for each in stayed if on_half[each] != before[each]]
    assert moved == ([half] if is_shared and len(cpus) > 1 else [])
    assert all(after[each] == before[each] for each in stayed)


def test_sessions_take_turns(node: NodeProcess) -> None:
    """Several at once: each waits for others, and hands its turn over."""

    def run(seed: int) -> SessionCounters:
        geometry = make_geometry()
        num_blocks = NUM_BLOCKS + 1 + seed
        batch = PagedBatch(geometry, NUM_BLOCKS, 3, seed)
        with closing(
            RawSession(node.address, geometry, num_blocks, is_shared=True)
        ) as session:
            for num_new in [[300, 40, 5]] + 40 * [[1, 1, 1]]:
                step, qkv = batch.grow(num_new)
                session.send_step(step)
                exact, _ = batch.expected(torch.float64)
                for layer in (0, 1):
                    assert max_error(session.attend(layer, qkv)[0], exact) < 1e-5
            return counters(session)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, range(4)))
    assert all(each.num_layer_calls == 82 for each in found)
    # Whoever found the turn taken waited for it.
    assert any(each.queue_s > 0 for each in found)


def test_a_long_layer_lets_others_compute(node: NodeProcess) -> None:
    """A layer of many slices goes on outside C, and the small ones in between in it."""
    long = make_geometry(num_layers=1)
    num_rows = 1024
    step = StepMetadata.whole(
        query_start_loc=np.array([0, num_rows], np.int32),
        seq_lens=np.array([16 * LONG_BLOCKS], np.int32),
        slot_mapping=np.full(num_rows, -1, np.int64),
        block_table=np.arange(LONG_BLOCKS, dtype=np.int32)[None],
    )
    geometry = make_geometry()
    batch = PagedBatch(geometry, NUM_BLOCKS, 2)
    with (
        closing(
            RawSession(
                node.address,
                long,
                LONG_BLOCKS,
                max_blocks_per_req=LONG_BLOCKS,
                is_shared=True,
            )
        ) as slow,
        closing(
            RawSession(node.address, geometry, NUM_BLOCKS, is_shared=True)
        ) as small,
    ):
        slow.send_step(step)
        qkv = torch.zeros(num_rows, (9 + 3 + 3) * 64)
        slow.send(slow.layer_header(0, qkv), as_bytes(qkv))
        assert eventually(lambda: counters(slow).attend_s > 0, timeout_s=60)
        for num_new in ([37, 5], *3 * [[1, 1]]):
            grown, rows = batch.grow(num_new)
            small.send_step(grown)
            exact, _ = batch.expected(torch.float64)
            for layer in (0, 1):
                assert max_error(small.attend(layer, rows)[0], exact) < 1e-5
        assert counters(slow).num_layer_calls == 0
        kind, payload = slow.receive()
        assert kind == FrameKind.OUT
        assert not np.frombuffer(payload, np.float32).any()
        assert counters(slow).num_layer_calls == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 7}, "layer 7; this session has 2"),
        ({"step": 9}, "before its STEP frame"),
        ({"micro_batch": 1}, "before its STEP frame"),
        ({"micro_batch": 40000}, "before its STEP frame"),
        ({"flags": FrameFlag.NONE}, ""),
        ({"num_bytes": 64}, "need 3,840"),
        ({"flags": FrameFlag.FUSED | FrameFlag.ON_DEVICE}, "in device memory"),
        ({"kind": FrameKind.OUT}, "which nodes don't take"),
    ],
)
def test_other_frames_are_the_interpreters(
    node: NodeProcess, changes: dict[str, int], message: str
) -> None:
    """Between layers that were served in C; nobody else notices."""
    geometry = make_geometry()
    with (
        closing(
            RawSession(node.address, geometry, NUM_BLOCKS, is_shared=True)
        ) as session,
        closing(RawSession(node.address, geometry, 65, is_shared=True)) as neighbour,
    ):
        step, qkv = PagedBatch(geometry, NUM_BLOCKS, 1).grow([1])
        session.send_step(step)
        expected = session.attend(0, qkv)[0]
        header = session.layer_header(0, qkv)
        for name, value in changes.items():
            setattr(header, name, value)
        session.send(header, as_bytes(qkv)[: header.num_bytes])
        kind, payload = session.receive()
        # Rows of one token are the same either way.
        assert kind == (FrameKind.ERROR if message else FrameKind.OUT)
        assert (
            message in payload.decode()
            if message
            else len(payload) == (expected.nbytes)
        )
        neighbour.send_step(step)
        torch.testing.assert_close(neighbour.attend(0, qkv)[0], expected)


def test_a_closed_session_serves_nothing(node: NodeProcess) -> None:
    geometry = make_geometry()
    step, qkv = PagedBatch(geometry, NUM_BLOCKS, 1).grow([1])
    with closing(
        RawSession(node.address, geometry, NUM_BLOCKS, is_shared=True)
    ) as session:
        session.send_step(step)
        session.attend(0, qkv)
        session.control.close_session(session.reservation)
        with pytest.raises(OSError, match="closed"):
            session.receive()
