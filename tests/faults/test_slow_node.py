# SPDX-License-Identifier: Apache-2.0
"""A node that is slow with much work is waited for; one that hangs is given up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from node_process import NodeProcess, eventually
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
from vllm_attn_offload.client.partition import Partition
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.frames import FrameFlag
from vllm_attn_offload.protocol.step import StepMetadata

StartNode = Callable[..., NodeProcess]
NUM_BLOCKS = 8
TIMEOUT_S, PAUSE_S = 0.5, 1.5


@pytest.fixture(params=["unix", "tcp"])
def paused(
    request: pytest.FixtureRequest, start_node: StartNode, tmp_path: Path
) -> Iterator[tuple[NodeProcess, NodeClient, memoryview]]:
    """A stopped node with a layer to attend, its client, and room for the output."""
    is_unix = request.param == "unix"
    node = start_node(f"unix:{tmp_path / 'node.sock'}" if is_unix else "127.0.0.1:0")
    geometry = make_geometry()
    step, qkv = PagedBatch(geometry, NUM_BLOCKS, 2).grow([37, 5])
    with closing(ControlClient(node.address, 5)) as control:
        reserved = control.reserve(reservation(geometry, 1 << 20))
        opened = control.open_session(session_of(reserved.reservation, NUM_BLOCKS))
        client = NodeClient(node.address, attach_request(opened, geometry), TIMEOUT_S)
        node.process.send_signal(signal.SIGSTOP)
        # The signal's sender does not wait for any of the threads.
        assert eventually(lambda: is_stopped(node.process.pid))
        client.post_step(1, 0, 0, encode_step(step))
        client.post_layer(
            1, 0, 0, FrameFlag.FUSED.value, as_bytes(qkv), has_queries=True
        )
        yield node, client, memoryview(bytearray(42 * 9 * 64 * 4))
        client.close()


def is_stopped(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all("\nState:\tT" in (task / "status").read_text() for task in tasks)


def test_wait_as_long_as_the_work_takes(
    paused: tuple[NodeProcess, NodeClient, memoryview],
) -> None:
    node, client, out = paused
    started = time.monotonic()
    threading.Timer(PAUSE_S, node.process.send_signal, [signal.SIGCONT]).start()
    client.receive_out(0, out, allowance_s=20.0)
    assert time.monotonic() - started > PAUSE_S - 0.2
    assert any(out)


def test_query_rows_count_in_the_deadline(start_node: StartNode) -> None:
    """2,048 rows over 1,024 tokens may take longer than the tokens alone."""
    node = start_node("127.0.0.1:0")
    geometry = make_geometry()
    batch = StepMetadata.whole(
        query_start_loc=np.array([0, 2048], np.int32),
        seq_lens=np.array([2048 + 1024], np.int32),
        slot_mapping=np.full(2048, -1),
        block_table=np.arange(192, dtype=np.int32)[None],
    )
    with closing(ControlClient(node.address, 5)) as control:
        reserved = control.reserve(reservation(geometry, 64 << 20))
        opened = control.open_session(session_of(reserved.reservation, 192))
        client = NodeClient(node.address, attach_request(opened, geometry), TIMEOUT_S)
        nodes = RemoteAttention([client], Partition("heads", (192,)), geometry)
        qkv = [torch.randn(2048, heads, 64) for heads in (9, 3, 3)]
        step = nodes.begin_step(batch)
        nodes.post_layer(step, 0, *qkv)
        node.process.send_signal(signal.SIGSTOP)
        threading.Timer(PAUSE_S, node.process.send_signal, [signal.SIGCONT]).start()
        output = torch.full((2048, 9, 64), torch.nan)
        nodes.collect(step, 0, output, torch.empty(2048, 9))
        assert not output.any()  # values of the pool, which are zero
        nodes.close()


def test_give_up_after_the_deadline(
    paused: tuple[NodeProcess, NodeClient, memoryview],
) -> None:
    _, client, out = paused
    started = time.monotonic()
    with pytest.raises(MemoryNodeError, match="nothing received for"):
        client.receive_out(0, out, allowance_s=0.5)
    assert 0.9 < time.monotonic() - started < 10
