# SPDX-License-Identifier: Apache-2.0
"""Sessions of a running node: right results, alone and beside others; bad frames."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from node_process import NodeProcess, eventually, running_node
from paged_batch import TORCH_DTYPES, PagedBatch, max_error
from raw_session import RawSession, encode_step, make_geometry

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.native.attention import load_cpu_library
from vllm_attn_offload.protocol.frames import (
    FRAME_HEADER_BYTES,
    FrameFlag,
    FrameHeader,
    FrameKind,
)
from vllm_attn_offload.protocol.geometry import SessionGeometry

NUM_BLOCKS = 40
# Tokens that each of three requests adds per step.
DECODE = [[15, 16, 17], *3 * [[1, 1, 1]]]
RAGGED_PREFILL = [[1, 16, 130], [33, 1, 15], [1, 0, 1]]
CHUNKED_PREFILL = [[31, 0, 1], [2, 64, 1], [64, 1, 0], [1, 1, 17], [1, 1, 1]]


@pytest.fixture(scope="module", params=["cpp", "torch"])
def node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    """A node of its own for each kernel that attends on a CPU."""
    if request.param == "cpp" and load_cpu_library() is None:
        pytest.skip("the CPU kernel library is not built: no C++ compiler at install")
    with running_node(
        tmp_path_factory.mktemp("node"),
        *("--attention-kernel", request.param, "--kv-cache-gib", "0.25"),
        # One CPU: threads that spin against those of the tests cost most of the time.
        *("--cpus", str(max(os.sched_getaffinity(0)))),
    ) as process:
        yield process


@pytest.mark.parametrize(
    ("heads", "steps", "head_size", "dtype"),
    [
        ((4, 4), DECODE, 64, "float32"),
        ((9, 3), DECODE, 64, "bfloat16"),
        ((8, 1), DECODE, 128, "float32"),
        ((9, 3), RAGGED_PREFILL, 64, "float32"),
        ((8, 1), RAGGED_PREFILL, 80, "bfloat16"),
        ((9, 3), CHUNKED_PREFILL, 64, "float32"),
        ((4, 4), CHUNKED_PREFILL, 128, "bfloat16"),
    ],
    ids=lambda value: {id(DECODE): "decode", id(RAGGED_PREFILL): "ragged"}.get(
        id(value), "chunked" if isinstance(value, list) else None
    ),
)
def test_attention_is_exact(
    node: NodeProcess,
    heads: tuple[int, int],
    steps: list[list[int]],
    head_size: int,
    dtype: Any,
) -> None:
    """Every slot outside the requests' own tokens holds NaN."""
    geometry = make_geometry(
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=head_size,
        dtype=dtype,
    )
    batch = PagedBatch(geometry, NUM_BLOCKS, num_reqs=3)
    with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
        step, nans = batch.poison(NUM_BLOCKS)
        session.send_step(step)
        assert session.attend(1, nans)[0].isnan().all()
        for num_new in steps:
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            out, lse = session.attend(1, qkv, want_lse=True)
            exact, exact_lse = batch.expected(torch.float64)
            # No worse than twice what plain torch loses in the same dtype.
            naive, naive_lse = batch.expected(TORCH_DTYPES[dtype])
            assert lse is not None
            assert max_error(out, exact) <= 2 * max_error(naive, exact) + 1e-6
            assert (
                max_error(lse, exact_lse) <= 2 * max_error(naive_lse, exact_lse) + 1e-5
            )


def test_layers_have_their_own_blocks(node: NodeProcess) -> None:
    geometry = make_geometry()
    first, second = (PagedBatch(geometry, NUM_BLOCKS, 2, seed=0) for _ in range(2))
    with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
        for num_new in ([20, 5], [1, 1]):
            step, qkv = first.grow(num_new)
            _, other = second.grow(num_new)
            other = other.flip(0)
            session.send_step(step)
            session.attend(1, other)
            out, _ = session.attend(0, qkv)
            exact, _ = first.expected(torch.float64)
            assert max_error(out, exact) < 1e-5


def test_slot_minus_one_is_not_stored(node: NodeProcess) -> None:
    """Rows without a slot leave what is stored there as it was."""
    geometry = make_geometry()
    batch = PagedBatch(geometry, NUM_BLOCKS, 1)
    with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
        step, qkv = batch.grow([17])
        session.send_step(step)
        before, _ = session.attend(0, qkv)
        session.send_step(replace(step, slot_mapping=step.slot_mapping * 0 - 1))
        width = geometry.layers[0].num_query_heads * geometry.layers[0].head_size
        spoiled = qkv.clone()
        spoiled[:, width:] = torch.nan
        after, _ = session.attend(0, spoiled)
    assert torch.equal(after, before)


def test_planar_rows_and_store_only_steps(node: NodeProcess) -> None:
    """A chunk is stored without an answer; later rows see it. One row queries."""
    geometry = make_geometry()
    batch = PagedBatch(geometry, NUM_BLOCKS, 1)
    with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
        step, qkv = batch.grow([40])
        stored = replace(step, query_start_loc=step.query_start_loc[:1])
        stored = replace(
            stored, seq_lens=step.seq_lens[:0], block_table=step.block_table[:0]
        )
        session.send_step(stored)
        _, key, value = qkv.split([9 * 64, 3 * 64, 3 * 64], dim=1)
        session.post_planar(0, (key, value))
        session.post_planar(0, (key, value), flags=FrameFlag.WANT_ACK)
        assert session.receive() == (FrameKind.OUT, b"")

        step, qkv = batch.grow([3])
        query, key, value = qkv.split([9 * 64, 3 * 64, 3 * 64], dim=1)
        last = replace(
            step,
            query_start_loc=np.array([0, 1], np.int32),
            query_positions=step.query_positions + 2,
        )
        session.send_step(last)
        session.post_planar(0, (query[2:], key, value))
        out, _ = session.receive_out(0, num_rows=1)
        assert max_error(out, batch.expected(torch.float64)[0][2:]) < 1e-5


def run_alone(address: str, geometry: SessionGeometry, seed: int) -> list[torch.Tensor]:
    """All outputs of a chunked prefill and a decode on a session of its own."""
    batch = PagedBatch(geometry, NUM_BLOCKS, 3, seed)
    outs = []
    with closing(RawSession(address, geometry, NUM_BLOCKS)) as session:
        for num_new in CHUNKED_PREFILL + 8 * [[1, 1, 1]]:
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            outs += [session.attend(layer, qkv)[0] for layer in (0, 1)]
    return outs


def test_concurrent_sessions_do_not_mix(node: NodeProcess) -> None:
    """Two engines at once get bit for bit what each gets alone."""
    runs = [
        partial(run_alone, node.address, make_geometry(), 1),
        partial(
            run_alone,
            node.address,
            make_geometry(num_query_heads=8, num_kv_heads=1, dtype="bfloat16"),
            2,
        ),
    ]
    alone = [run() for run in runs]
    with ThreadPoolExecutor(4) as pool:
        together = [
            future.result() for future in [pool.submit(run) for run in [*runs, *runs]]
        ]
    for expected, found in zip([*alone, *alone], together, strict=True):
        assert all(map(torch.equal, found, expected))


class Healthy:
    """A session that decodes on while others break."""

    def __init__(self, address: str) -> None:
        self._batch = PagedBatch(make_geometry(), NUM_BLOCKS, 2)
        self.session = RawSession(address, make_geometry(), NUM_BLOCKS)

    def assert_exact(self) -> None:
        step, qkv = self._batch.grow([1, 1])
        self.session.send_step(step)
        out, _ = self.session.attend(0, qkv)
        assert max_error(out, self._batch.expected(torch.float64)[0]) < 1e-5


@pytest.fixture(scope="module")
def healthy(node: NodeProcess) -> Iterator[Healthy]:
    other = Healthy(node.address)
    yield other
    other.session.close()


def post(session: RawSession, kind: int, payload: bytes = b"", **header: int) -> None:
    fields = {"step": 1, "num_bytes": len(payload)} | header
    session.send(FrameHeader(kind, **fields), payload)


def post_step(session: RawSession, **header: int) -> None:
    step, _ = PagedBatch(session.geometry, NUM_BLOCKS, 1).grow([1])
    post(session, FrameKind.STEP, bytes(encode_step(step)), **header)


def post_bad_block(session: RawSession) -> None:
    step, _ = PagedBatch(session.geometry, NUM_BLOCKS, 1).grow([20])
    table = step.block_table + NUM_BLOCKS
    payload = encode_step(replace(step, block_table=table))
    post(session, FrameKind.STEP, bytes(payload))


def post_bad_slot(session: RawSession) -> None:
    step, _ = PagedBatch(session.geometry, NUM_BLOCKS, 1).grow([1])
    slots = step.slot_mapping * 0 + NUM_BLOCKS * 16
    payload = encode_step(replace(step, slot_mapping=slots))
    post(session, FrameKind.STEP, bytes(payload))


def post_fused_without_queries(session: RawSession) -> None:
    step, _ = PagedBatch(session.geometry, NUM_BLOCKS, 1).grow([1])
    no_rows = step.query_start_loc * 0
    post(
        session,
        FrameKind.STEP,
        bytes(encode_step(replace(step, query_start_loc=no_rows))),
    )
    post(session, FrameKind.LAYER, bytes(3840), flags=FrameFlag.FUSED)


def post_layer_after_step(
    session: RawSession, length: int = 4, claimed: int | None = None, **header: int
) -> None:
    post_step(session)
    num_bytes = length if claimed is None else claimed
    post(session, FrameKind.LAYER, bytes(length), num_bytes=num_bytes, **header)


BAD_FRAMES: dict[str, tuple[Callable[[RawSession], None], str]] = {
    "unknown kind": (lambda s: post(s, 77), "frame of kind 77"),
    "reply to the node": (lambda s: post(s, FrameKind.OUT), "frame of kind 3"),
    "layer before step": (
        lambda s: post(s, FrameKind.LAYER, layer=1),
        "layer 1 of step 1 before its STEP",
    ),
    "layer of another step": (
        lambda s: post_layer_after_step(s, step=2),
        "layer 0 of step 2 before its STEP",
    ),
    "layer of another micro-batch": (
        lambda s: post_layer_after_step(s, micro_batch=1),
        "before its STEP",
    ),
    "layer out of range": (
        lambda s: post_layer_after_step(s, layer=2),
        "layer 2; this session has 2",
    ),
    "layer too short": (
        lambda s: post_layer_after_step(s, length=3836),
        "3,836 bytes; 1 query rows and 1 tokens need 3,840",
    ),
    "layer too long": (
        lambda s: post_layer_after_step(s, claimed=1 << 60),
        "1,152,921,504,606,846,976 bytes; 1 query rows and 1 tokens need 3,840",
    ),
    "fused rows of other counts": (
        post_fused_without_queries,
        "fused rows for 0 query",
    ),
    "step of a missing group": (lambda s: post_step(s, group=1), "STEP for KV group 1"),
    "micro-batch out of range": (
        lambda s: post_step(s, micro_batch=2),
        "STEP for micro-batch 2",
    ),
    "step with flags of a layer": (
        lambda s: post_step(s, flags=FrameFlag.WANT_LSE),
        "a STEP with flags 0x1",
    ),
    "step too long": (
        lambda s: post(s, FrameKind.STEP, num_bytes=1 << 60),
        "STEP of 1,152,921,504,606,846,976 bytes; at most",
    ),
    "step too short": (
        lambda s: post(s, FrameKind.STEP, b"123"),
        "STEP frame of 3 bytes is too short",
    ),
    "block out of range": (post_bad_block, "this session has blocks 0 to 39"),
    "slot out of range": (post_bad_slot, "this session has slots 0 to 639"),
    "no frame": (
        lambda s: s.send_raw(64 * b"x"),
        "not a frame of this protocol",
    ),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frame_ends_only_its_session(
    node: NodeProcess, healthy: Healthy, name: str
) -> None:
    send, message = BAD_FRAMES[name]
    with closing(RawSession(node.address, make_geometry(), NUM_BLOCKS)) as broken:
        send(broken)
        kind, payload = broken.receive()
        assert kind == FrameKind.ERROR
        assert message in payload.decode()
        with pytest.raises(ConnectionError):
            broken.receive()
    healthy.assert_exact()


def test_memory_runs_out_in_one_session(node: NodeProcess) -> None:
    """Its worker is told, in a frame; others go on."""
    geometry = make_geometry()
    batch = PagedBatch(geometry, NUM_BLOCKS, 2)
    with (
        closing(RawSession(node.address, geometry, NUM_BLOCKS)) as other,
        closing(
            RawSession(node.address, geometry, NUM_BLOCKS, max_blocks_per_req=1 << 19)
        ) as session,
    ):
        step, qkv = batch.grow([37, 5])
        # Larger than what an allocator keeps at hand.
        header = FrameHeader(FrameKind.STEP, step=1, num_bytes=200 << 20)
        packed = bytearray(FRAME_HEADER_BYTES)
        header.pack_into(packed)
        limits = resource.prlimit(node.process.pid, resource.RLIMIT_AS)
        used = psutil.Process(node.process.pid).memory_info().vms
        resource.prlimit(node.process.pid, resource.RLIMIT_AS, (used, limits[1]))
        try:
            session.send_raw(packed)
            kind, payload = session.receive()
        finally:
            resource.prlimit(node.process.pid, resource.RLIMIT_AS, limits)
        assert kind == FrameKind.ERROR
        assert b"the memory node could not compute (MemoryError" in payload
        other.send_step(step)
        out, _ = other.attend(0, qkv)
        assert max_error(out, batch.expected(torch.float64)[0]) < 1e-5
    assert "Traceback" not in node.log()


def test_dropped_channel_ends_only_its_session(
    node: NodeProcess, healthy: Healthy
) -> None:
    """A worker that dies in the middle of a frame."""
    with closing(RawSession(node.address, make_geometry(), NUM_BLOCKS)) as broken:
        post_step(broken)
        post(broken, FrameKind.LAYER, bytes(100), num_bytes=3840)
        broken.transport.close()
        healthy.assert_exact()


def test_pool_shows_no_older_data(node: NodeProcess) -> None:
    """Every block that a killed engine wrote holds zeros for the next one."""
    geometry = make_geometry()
    num_tokens = NUM_BLOCKS * geometry.groups[0].block_size
    step, qkv = PagedBatch(geometry, NUM_BLOCKS, 1).grow([num_tokens])
    first = RawSession(node.address, geometry, NUM_BLOCKS)
    first.send_step(step)
    assert first.attend(1, qkv)[0].abs().min() > 0
    first.close()
    unstored = replace(step, slot_mapping=np.full_like(step.slot_mapping, -1))
    with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as second:
        second.send_step(unstored)
        assert not second.attend(1, qkv)[0].any()


def test_pool_is_freed_while_the_node_sends(node: NodeProcess) -> None:
    """An engine dies while the node waits for it to take its output."""
    geometry = make_geometry(num_query_heads=16, num_kv_heads=1, head_size=256)
    control = ControlClient(node.address, 5)
    with closing(control):
        free_bytes = control.refresh_info().kv_bytes_free
        broken = RawSession(node.address, geometry, NUM_BLOCKS)
        step, qkv = PagedBatch(geometry, NUM_BLOCKS, 1).grow([500])
        broken.send_step(step)
        payload = qkv.view(torch.uint8).numpy().data.cast("B")
        broken.send(broken.layer_header(0, qkv), payload)
        assert broken.has_reply()
        assert control.refresh_info().kv_bytes_free < free_bytes
        broken.control.close()
        assert eventually(lambda: control.refresh_info().kv_bytes_free == free_bytes)
        broken.close()
    assert "Traceback" not in node.log()
