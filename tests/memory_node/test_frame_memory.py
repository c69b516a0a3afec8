# SPDX-License-Identifier: Apache-2.0
"""Memory of a node beside its blocks: bounded for frames, flat as sessions go by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from node_process import NodeProcess, eventually, running_node
from paged_batch import PagedBatch
from raw_session import (
    as_bytes,
    attach_request,
    encode_step,
    make_geometry,
    reservation,
    session_of,
)

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.frame_sizes import FrameSizes
from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.frames import FrameFlag
from vllm_attn_offload.protocol.geometry import (
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)
from vllm_attn_offload.protocol.step import StepMetadata

NUM_BLOCKS = 16
GEOMETRY = make_geometry()
KV_BYTES = NUM_BLOCKS * 2 * 2 * 16 * 3 * 64 * 4
TIMEOUT_S = 10.0
#: A session has a pool of 768 KiB.
MAX_KIB_PER_SESSION = 20
#: What allocators and checks of arrays take in passing.
SLACK_BYTES = 24 << 20
NO_SLOTS = "gets no shared memory but frames on its socket"


def many_heads() -> SessionGeometry:
    """Layers of several shapes, so that each has a plan of its own."""
    return SessionGeometry(
        "float32",
        [KVGroup(16)],
        [
            LayerGeometry(f"layers.{i}", 0, i, 512 << i, 512, 8, 8, 1.0)
            for i in range(3)
        ],
    )


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    if load_waits() is None:
        pytest.skip("the C library is not built")
    with running_node(tmp_path, "--kv-cache-gib", "0.25") as process:
        yield process


def attach(control: ControlClient, address: str, max_num_tokens: int) -> NodeClient:
    """A data channel of a session with such limits."""
    reserved = control.reserve(reservation(GEOMETRY, KV_BYTES))
    request = session_of(reserved.reservation, NUM_BLOCKS)
    request = msgspec.structs.replace(request, max_num_tokens=max_num_tokens)
    opened = control.open_session(request)
    return NodeClient(address, attach_request(opened, GEOMETRY), TIMEOUT_S)


def test_slots_take_what_frames_may(node: NodeProcess) -> None:
    """Four slots each way count four times; without room frames use the socket."""
    # A frame each way takes 0.14 GiB of 1, and its slots 0.57.
    tokens = 25_000
    with ExitStack() as stack:
        engines = [
            stack.enter_context(closing(ControlClient(node.address, TIMEOUT_S)))
            for _ in range(4)
        ]
        clients = [attach(engine, node.address, tokens) for engine in engines[:3]]
        assert node.log().count(NO_SLOTS) == 2
        with pytest.raises(MemoryNodeError, match=r"but 0\.\d+ of the 1\.00 GiB"):
            attach(engines[3], node.address, tokens)
        for client in clients:
            client.close()
    assert eventually(lambda: node.log().count("released engine") == 4)
    with closing(ControlClient(node.address, TIMEOUT_S)) as control:
        attach(control, node.address, tokens).close()
        assert node.log().count(NO_SLOTS) == 2


def test_an_engine_leaves_room_for_others(node: NodeProcess) -> None:
    """However many sessions it opens, a quarter of the memory for frames stays."""
    with (
        closing(ControlClient(node.address, TIMEOUT_S)) as greedy,
        closing(ControlClient(node.address, TIMEOUT_S)) as other,
    ):
        clients = [attach(greedy, node.address, 25_000)]
        with pytest.raises(MemoryNodeError, match="are free for this engine"):
            clients += [attach(greedy, node.address, 25_000) for _ in range(4)]
        clients.append(attach(other, node.address, 25_000))
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("kernel", "geometry", "num_reqs", "width"),
    [
        ("cpp", GEOMETRY, 4096, 512),
        ("torch", GEOMETRY, 4096, 512),
        ("cpp", many_heads(), 2048, 8),
    ],
    ids=["cpp", "torch", "heads"],
)
def test_plans_take_what_was_counted(
    kernel: str, geometry: SessionGeometry, num_reqs: int, width: int, tmp_path: Path
) -> None:
    """Tables as long and as wide as a session may send, for all micro-batches."""
    num_blocks = min(64, width)
    with (
        running_node(
            tmp_path, "--kv-cache-gib", "0.25", "--attention-kernel", kernel
        ) as node,
        closing(ControlClient(node.address, TIMEOUT_S)) as control,
    ):
        come_and_go(node.address)
        reserved = control.reserve(reservation(geometry, 64 << 20))
        request = msgspec.structs.replace(
            session_of(reserved.reservation, num_blocks, width), max_num_reqs=num_reqs
        )
        sizes = FrameSizes(geometry, request)
        counted = sum(sizes.longest()) + sizes.plan_bytes
        before = peak_kib(node)
        opened = control.open_session(request)
        client = NodeClient(node.address, attach_request(opened, geometry), TIMEOUT_S)
        step = StepMetadata.whole(
            query_start_loc=np.minimum(np.arange(num_reqs + 1), 2048).astype(np.int32),
            seq_lens=np.full(num_reqs, 16 * num_blocks, np.int32),
            slot_mapping=np.full(2048, -1, np.int64),
            block_table=np.zeros((num_reqs, width), np.int32),
        )
        for number in range(1, 9):
            client.post_step(number, number % 2, 0, encode_step(step))
        control.ping(TIMEOUT_S)
        assert eventually(lambda: control.stats().sessions[0].counters.num_steps == 8)
        assert peak_kib(node) - before < (counted + SLACK_BYTES) >> 10
        client.close()


def test_sessions_leave_nothing(node: NodeProcess) -> None:
    """Neither descriptors nor threads, nor memory once the threads' heaps are warm."""
    process = psutil.Process(node.process.pid)
    idle = process.num_fds(), process.num_threads()
    for _ in range(100):
        come_and_go(node.address)
    before = anonymous_kib(node)
    for _ in range(100):
        come_and_go(node.address)
    assert anonymous_kib(node) - before < 100 * MAX_KIB_PER_SESSION
    assert eventually(lambda: process.num_fds() <= idle[0])
    assert eventually(lambda: process.num_threads() <= idle[1])


def come_and_go(address: str) -> None:
    """One session through shared memory that prefills once."""
    step, qkv = PagedBatch(GEOMETRY, NUM_BLOCKS, 2).grow([37, 5])
    out = memoryview(bytearray(42 * 9 * 64 * 4))
    with closing(ControlClient(address, TIMEOUT_S)) as control:
        client = attach(control, address, 256)
        client.post_step(1, 0, 0, encode_step(step))
        for layer in range(len(GEOMETRY.layers)):
            client.post_layer(
                1, 0, layer, FrameFlag.FUSED.value, as_bytes(qkv), has_queries=True
            )
            client.receive_out(layer, out)
        client.close()


def peak_kib(node: NodeProcess) -> int:
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(peak)


def anonymous_kib(node: NodeProcess) -> int:
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    (anonymous,) = re.findall(r"RssAnon:\s+(\d+) kB", status)
    return int(anonymous)
