# SPDX-License-Identifier: Apache-2.0
"""A worker's exchange with its nodes through the classes that the worker uses."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from node_process import NodeProcess, running_nodes
from raw_session import attach_request, make_geometry, reservation, session_of
from stopped import stop_process
from worker_batch import WorkerBatch

from vllm_attn_offload.attention.cpu_exchange import CpuExchange
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.attention.readback import HostStep
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import MAX_UNACKNOWLEDGED_BYTES, NodeClient
from vllm_attn_offload.client.partition import (
    Partition,
    PartitionKind,
    shard_geometry,
)
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.client.step_partition import partition_step
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

NUM_BLOCKS = 60
GEOMETRY = make_geometry()
BLOCK_SIZE = GEOMETRY.groups[0].block_size


class Worker:
    """Requests on sessions of their own, one per node."""

    def __init__(
        self,
        addresses: list[str],
        *,
        geometry: SessionGeometry = GEOMETRY,
        kind: PartitionKind = "heads",
        num_reqs: int = 1,
        timeout_s: float = 10.0,
        tolerate_loss: bool = False,
    ) -> None:
        self._geometry = geometry
        count = len(addresses)
        self.batch = WorkerBatch(geometry, NUM_BLOCKS, num_reqs)
        # In a partition by blocks nodes of unequal size.
        sizes = [NUM_BLOCKS] * count
        if kind == "blocks":
            sizes = [NUM_BLOCKS // count - 5, *sizes[1:-1], NUM_BLOCKS // count + 5]
        self.partition = Partition(kind, tuple(sizes[:count]))
        sharded = shard_geometry(geometry, kind, 0, count)
        self.controls, self.reservations, clients = [], [], []
        for address, num_blocks in zip(addresses, sizes, strict=False):
            control = ControlClient(address, 10)
            self.controls.append(control)
            reserved = control.reserve(reservation(sharded, 8 << 20))
            self.reservations.append(reserved.reservation)
            opened = control.open_session(session_of(reserved.reservation, num_blocks))
            attach = attach_request(opened, sharded)
            clients.append(NodeClient(address, attach, timeout_s))
        self.nodes = RemoteAttention(
            clients, self.partition, geometry, tolerate_loss=tolerate_loss
        )

    def step(self, num_new: list[int]) -> float:
        """Run a step on both layers; the largest error of the outputs."""
        output = self.attend(*self.batch.grow(num_new))
        return float((output - self.batch.expected()).abs().max())

    def attend(self, batch: StepMetadata, qkv: Rows) -> torch.Tensor:
        """Output of the last layer."""
        query = qkv[0]
        metadata = AttentionOffloadMetadata(HostStep(batch), BLOCK_SIZE)
        attention = LayerAttention(self._geometry.layers[0].softmax_scale)
        output = torch.full(query.shape, torch.nan, dtype=query.dtype)
        exchange = CpuExchange(self.nodes)
        for index in (0, 1):
            exchange.attend(metadata, index, qkv, output, attention)
        return output

    def close(self) -> None:
        self.nodes.close()
        for control in self.controls:
            control.close()


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Three nodes."""
    directories = [tmp_path_factory.mktemp("node") for _ in range(3)]
    options = ("--kv-cache-gib", "0.25", "--cpus", str(max(os.sched_getaffinity(0))))
    with running_nodes(
        directories,
        *options,
    ) as running:
        yield running


#: Chunks with and without context, decodes, one new token; then decodes alone.
STEPS = [[40, 3, 1], [25, 1, 1], [1, 17, 0], [2, 1, 33], [1, 1, 1], [0, 1, 0]]


def test_nodes_know_the_times_of_a_worker(addresses: list[str]) -> None:
    """Sums over all nodes, as they were when the last step began."""
    worker = Worker(addresses[:2], kind="blocks")
    known: list[tuple[float, float, float]] = []
    for num_new in ([20], [1], [1]):
        times = worker.nodes.times()
        assert worker.step(num_new) < 1e-5
        for control in worker.controls:
            (session,) = control.stats().sessions
            told = session.counters
            assert told.worker_pack_s == pytest.approx(times["pack_s"], abs=1e-8)
            assert told.worker_send_s == pytest.approx(times["send_s"], abs=1e-8)
            assert told.worker_wait_s == pytest.approx(times["wait_s"], abs=1e-8)
        known.append((told.worker_pack_s, told.worker_send_s, told.worker_wait_s))
    assert known[0] == (0, 0, 0)
    assert all(0 < one < two for one, two in zip(*known[1:], strict=True))
    worker.close()


@pytest.mark.parametrize(
    ("kind", "num_nodes", "heads", "dtype"),
    [
        ("heads", 1, (9, 3), "float32"),
        ("heads", 1, (9, 3), "bfloat16"),
        ("heads", 3, (9, 3), "float32"),
        ("heads", 2, (8, 2), "bfloat16"),
        ("blocks", 2, (9, 3), "float32"),
        ("blocks", 3, (4, 1), "float32"),
        ("blocks", 3, (9, 3), "bfloat16"),
    ],
)
def test_output_is_causal_attention(
    addresses: list[str],
    kind: PartitionKind,
    num_nodes: int,
    heads: tuple[int, int],
    dtype: str,
) -> None:
    geometry = make_geometry(
        num_query_heads=heads[0], num_kv_heads=heads[1], dtype=dtype
    )
    worker = Worker(addresses[:num_nodes], geometry=geometry, kind=kind, num_reqs=3)
    for num_new in STEPS:
        assert worker.step(num_new) < (1e-5 if dtype == "float32" else 3e-2)
    times = worker.nodes.times()
    assert times["num_steps"], times["num_layer_calls"] == (len(STEPS), 2 * len(STEPS))
    assert times["wait_s"] > 0
    worker.close()


@pytest.mark.parametrize("is_tcp", [False, True], ids=["shared memory", "TCP"])
def test_stored_chunks_are_acknowledged(
    node: NodeProcess, addresses: list[str], is_tcp: bool
) -> None:
    """A long prefill sends more than may be under way, and goes on."""
    worker = Worker([node.address if is_tcp else addresses[0]])
    batch, (query, key, value) = worker.batch.grow([900])
    step = worker.nodes.begin_step(batch)
    output = torch.zeros_like(query)
    layer_bytes = key.nbytes + value.nbytes
    for call in range(MAX_UNACKNOWLEDGED_BYTES // layer_bytes + 3):
        worker.nodes.post_layer(step, call % 2, query, key, value)
        worker.nodes.collect(step, call % 2, output[:0])
    assert worker.step([1]) < 1e-5
    worker.close()


def test_first_chunk_asks_nodes_for_nothing() -> None:
    """Nothing is cached: every row is stored, none is queried."""
    batch, _ = WorkerBatch(GEOMETRY, NUM_BLOCKS, 2).grow([40, 20])
    plan = partition_step(batch, Partition("heads", (NUM_BLOCKS,)), 16)
    (part,) = plan.shares
    assert (part.step.num_query_rows, part.step.num_tokens) == (0, 60)
    assert not plan.needs_merge


def test_blocks_are_read_once() -> None:
    """Every cached token is attended on exactly one node, load follows capacity."""
    requests = WorkerBatch(GEOMETRY, 4000, 16)
    requests.grow([137 * (index + 3) for index in range(16)])
    batch, _ = requests.grow([1] * 16)
    partition = Partition("blocks", (1000, 1000, 2000))
    plan = partition_step(batch, partition, 16)
    tokens = [int(part.step.tokens_held(16).sum()) for part in plan.shares]
    assert sum(tokens) == int(batch.seq_lens.sum())
    load = np.array(tokens) / np.array(partition.blocks_per_node)
    assert load.max() / load.mean() < 1.25
    assert sum(part.step.num_tokens for part in plan.shares) == 16


def test_refusal_of_the_node(addresses: list[str]) -> None:
    """The node's sentence reaches the worker."""
    worker = Worker(addresses[:1])
    batch, rows = worker.batch.grow([1])
    slots = np.full_like(batch.slot_mapping, NUM_BLOCKS * BLOCK_SIZE)
    with pytest.raises(MemoryNodeError, match=r"slots from 960 to 960; this session"):
        worker.attend(replace(batch, slot_mapping=slots), rows)
    with pytest.raises(MemoryNodeError, match=r"slots from 960 to 960; this session"):
        worker.step([1])
    worker.close()


def test_node_hangs_and_is_killed(
    mortal_node: NodeProcess, addresses: list[str]
) -> None:
    """A stopped process answers nothing; the deadline ends the wait."""
    first = Worker([mortal_node.address], timeout_s=1.0)
    second = Worker(
        [addresses[0], mortal_node.address], kind="blocks", tolerate_loss=True
    )
    assert first.step([1]) < 1e-5
    assert second.step([33]) < 1e-5
    stop_process(mortal_node.process.pid)
    started = time.monotonic()
    with pytest.raises(MemoryNodeError, match=r"nothing received for 1\.0 s"):
        first.step([1])
    assert time.monotonic() - started < 4
    mortal_node.kill()
    # The step ends, with zeros, and says so.
    assert second.step([1]) > 0
    first_loss = second.nodes.loss
    assert "its session was lost" in str(first_loss)
    assert second.step([1]) > 0
    assert second.nodes.loss is first_loss


def test_lost_channel_leaves_nothing(addresses: list[str]) -> None:
    """Neither descriptors nor mapped memory wait for the garbage collector."""

    def lose_one() -> int:
        worker = Worker([addresses[0]], tolerate_loss=True)
        assert worker.step([33]) < 1e-5
        worker.controls[0].close_session(worker.reservations[0])
        worker.step([1])
        assert worker.nodes.loss is not None
        worker.close()
        del worker
        return len(os.listdir("/proc/self/fd"))

    gc.disable()
    try:
        assert len({lose_one() for _ in range(3)}) == 1
    finally:
        gc.enable()
