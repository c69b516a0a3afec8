# SPDX-License-Identifier: Apache-2.0
"""Layers that are exchanged in one call of the C library, and what stops that."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from channel_pairs import shared_memory_pair
from node_process import NodeProcess, running_node
from raw_session import attach_request, make_geometry, reservation, session_of
from stopped import stop_process
from worker_batch import WorkerBatch

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.layer_call import LayerCall
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.partition import Partition
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.client.sent_step import SentStep
from vllm_attn_offload.errors import MemoryNodeError, NodeDefectError
from vllm_attn_offload.memory_node.node_channel import NUM_SLOTS
from vllm_attn_offload.native.channel import load_channels
from vllm_attn_offload.protocol.frames import FrameHeader, FrameKind

pytestmark = pytest.mark.skipif(
    load_channels() is None, reason="the C library is not built"
)

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

GEOMETRY = make_geometry()
NUM_BLOCKS = 60


@dataclass
class Worker:
    """Requests of a session whose rows all go to one node."""

    batch: WorkerBatch
    client: NodeClient
    nodes: RemoteAttention
    control: ControlClient

    def decode(self, num_tokens: int = 1) -> tuple[SentStep, Rows]:
        """A step of as many tokens for each request, and their rows."""
        batch, rows = self.batch.grow([num_tokens, num_tokens])
        return self.nodes.begin_step(batch, decode_threshold=num_tokens), rows

    def error(self, output: torch.Tensor) -> float:
        """Largest error of a layer's output in the last step."""
        return float((output - self.batch.expected()).abs().max())

    def close(self) -> None:
        self.nodes.close()
        self.control.close()


def make_worker(address: str, timeout_s: float = 10.0) -> Worker:
    control = ControlClient(address, 10)
    reserved = control.reserve(reservation(GEOMETRY, 8 << 20))
    opened = control.open_session(session_of(reserved.reservation, NUM_BLOCKS))
    client = NodeClient(address, attach_request(opened, GEOMETRY), timeout_s)
    nodes = RemoteAttention([client], Partition("heads", (NUM_BLOCKS,)), GEOMETRY)
    return Worker(WorkerBatch(GEOMETRY, NUM_BLOCKS, 2), client, nodes, control)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    cpu = str(max(os.sched_getaffinity(0)))
    with running_node(tmp_path, "--kv-cache-gib", "0.1", "--cpus", cpu) as process:
        yield process


@pytest.fixture
def worker(node: NodeProcess) -> Iterator[Worker]:
    with closing(make_worker(node.address, timeout_s=1.0)) as made:
        yield made


@pytest.fixture
def rung() -> Iterator[list[int]]:
    """Signals of a timer that the test may set."""
    signals: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda number, _: signals.append(number))
    yield signals
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def in_wider_rows(part: torch.Tensor) -> torch.Tensor:
    """The same rows with other bytes between them."""
    wide = part.new_full((part.shape[0], 3, *part.shape[1:]), torch.nan)
    wide[:, 1] = part
    return wide[:, 1]


def by_heads(part: torch.Tensor) -> torch.Tensor:
    """The same rows, all of a head together: no row is in one piece."""
    return part.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(
    ("change", "is_one_call"),
    [
        (lambda part: part, True),
        (lambda part: part.clone(), True),
        (in_wider_rows, True),
        (by_heads, False),
    ],
    ids=["fused", "apart", "in wider rows", "by heads"],
)
def test_rows_lie_as_models_leave_them(
    worker: Worker,
    change: Callable[[torch.Tensor], torch.Tensor],
    is_one_call: bool,
) -> None:
    call = worker.client.layer_call()
    assert call is not None
    for num_tokens in (1, 1, 3, 1):
        step, rows = worker.decode(num_tokens)
        for layer in (0, 1):
            output = torch.full_like(rows[0], torch.nan).contiguous()
            changed = [change(part) for part in rows]
            worker.nodes.exchange(step, layer, *changed, output)
            assert worker.error(output) < 1e-5
            assert call.name_rows(*changed, output) == is_one_call
    times = worker.nodes.times()
    assert times["num_layer_calls"] == 8
    assert min(times[part] for part in ("pack_s", "send_s", "wait_s")) > 0


@pytest.mark.parametrize(
    ("num_kv_rows", "num_kv_heads", "dtype", "is_one_call"),
    [
        (3, 2, torch.bfloat16, True),
        (3, 2, torch.float32, False),
        (3, 1, torch.bfloat16, True),
        (1, 2, torch.bfloat16, False),
    ],
    ids=["alike", "other dtype", "fewer heads", "fewer rows"],
)
def test_every_layer_is_looked_at(
    worker: Worker,
    num_kv_rows: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    is_one_call: bool,
) -> None:
    """Also where the one before had the same strides."""
    call = worker.client.layer_call()
    assert call is not None
    query = torch.zeros(3, 4, 8, dtype=torch.bfloat16)
    wide = torch.zeros(3, 2, 8, dtype=torch.bfloat16)
    assert call.name_rows(query, wide, wide, query)
    part = wide.to(dtype)[:num_kv_rows, :num_kv_heads]
    assert call.name_rows(query, part, part, query) == is_one_call


def test_a_node_that_frees_nothing(rung: list[int]) -> None:
    """It answers, and its slots stay taken: signals put no deadline off."""
    worker, node = shared_memory_pair()
    with closing(worker), closing(node):
        call = LayerCall(worker, 0.5)
        rows = torch.zeros(1, 1, 8)
        header = FrameHeader(FrameKind.OUT, num_bytes=rows.nbytes)
        for _ in range(NUM_SLOTS):
            node.send(header, memoryview(bytes(rows.nbytes)))
            assert call.name_rows(rows, rows, rows, rows)
            assert call.run(0, 10.0, FrameHeader())
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="the peer takes no data"):
            call.run(0, 10.0, FrameHeader())
        assert 0.4 < time.monotonic() - started < 2
        assert len(rung) > 2
        assert not call.is_sent


def test_silent_node_is_lost(node: NodeProcess, worker: Worker) -> None:
    step, rows = worker.decode()
    output = torch.empty_like(rows[0]).contiguous()
    worker.nodes.exchange(step, 0, *rows, output)
    stop_process(node.process.pid)
    started = time.monotonic()
    with pytest.raises(MemoryNodeError, match=r"nothing received for 1\.\d s"):
        worker.nodes.exchange(step, 1, *rows, output)
    assert time.monotonic() - started < 4
    node.process.send_signal(signal.SIGCONT)


def test_dead_node_is_lost(node: NodeProcess, worker: Worker) -> None:
    step, rows = worker.decode()
    output = torch.empty_like(rows[0]).contiguous()
    worker.nodes.exchange(step, 0, *rows, output)
    node.kill()
    with pytest.raises(MemoryNodeError, match="its session was lost"):
        worker.nodes.exchange(step, 1, *rows, output)


def test_refusal_reaches_the_worker(worker: Worker) -> None:
    step, rows = worker.decode()
    output = torch.empty_like(rows[0]).contiguous()
    with pytest.raises(NodeDefectError, match="layer 7; this session has 2"):
        worker.nodes.exchange(step, 7, *rows, output)


def test_signals_change_nothing(
    node: NodeProcess, worker: Worker, rung: list[int]
) -> None:
    """Handlers run while the node is waited for, and the wait goes on."""
    step, rows = worker.decode()
    output = torch.empty_like(rows[0]).contiguous()
    worker.nodes.exchange(step, 0, *rows, output)
    stop_process(node.process.pid)
    resume = threading.Timer(0.5, node.process.send_signal, (signal.SIGCONT,))
    resume.start()
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    worker.nodes.exchange(step, 1, *rows, output)
    resume.join()
    assert worker.error(output) < 1e-5
    assert len(rung) > 10
