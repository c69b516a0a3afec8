# SPDX-License-Identifier: Apache-2.0
"""Layers on their way between a device and real nodes: nothing overtakes anything."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import torch
from deferred_device import (
    DeferredAttention,
    DeferredDevice,
    DeferredStreams,
    Order,
    Pace,
)
from host_device import HostDevice
from node_process import NodeProcess, running_node
from raw_session import (
    attach_request,
    make_geometry,
    reservation,
    session_of,
)
from shared_rows_node import LaggingAttention, sharing_node
from stored_kv import with_fp8
from vllm.v1.attention.backend import CommonAttentionMetadata
from worker_batch import WorkerBatch

from vllm_attn_offload.attention.cuda.exchange import CudaExchange
from vllm_attn_offload.attention.cuda.metadata import CudaReadback
from vllm_attn_offload.attention.impl import AttentionOffloadImpl
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.attention.micro_batch.baton import Baton
from vllm_attn_offload.attention.micro_batch.split import cut_batch
from vllm_attn_offload.attention.readback import HostStep
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.partition import (
    Partition,
    PartitionKind,
    shard_geometry,
)
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata

NUM_BLOCKS, NUM_LAYERS = 60, 3
GEOMETRY = make_geometry(num_layers=NUM_LAYERS)
LAYER = GEOMETRY.layers[0]
BLOCK_SIZE = GEOMETRY.groups[0].block_size
PACES: tuple[Pace, ...] = ("late", "early", "kernels-early")
#: Rows that pad the batch to a captured graph's size.
NUM_PADDING = 3
#: First chunks alone, chunks with and without context among decodes, decodes alone.
STEPS = [[40, 3, 0], [25, 0, 1], [1, 1, 1], [1, 17, 1], [0, 0, 20], [1, 0, 1]]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two nodes."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                running_node(tmp_path_factory.mktemp("node"), "--kv-cache-gib", "0.25")
            ).address
            for _ in range(2)
        ]


@pytest.fixture
def sharing(tmp_path: Path) -> Iterator[tuple[str, LaggingAttention]]:
    """A node that shares memory of its device."""
    if load_waits() is None:
        pytest.skip("memory is shared by the C library, which is not built")
    with sharing_node(tmp_path) as node:
        yield node


class DeviceWorker:
    """Three requests whose q, k, v are on a deferred device.

    Layer ``i`` has values larger by ``i``, and so its output: layers are told apart.
    """

    def __init__(
        self,
        addresses: list[str],
        device: DeferredDevice,
        kind: PartitionKind,
        shared: HostDevice | None = None,
        *,
        tolerate_loss: bool = False,
        geometry: SessionGeometry = GEOMETRY,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.device = device
        self._geometry, self._sinks = geometry, sinks
        # Of layers that all have values of their own, and no sink, which has none.
        self._spread = 1.0 if geometry is GEOMETRY and sinks is None else 0.0
        self.requests = WorkerBatch(geometry, NUM_BLOCKS, 3)
        count = len(addresses)
        sizes = [NUM_BLOCKS] if count == 1 else [NUM_BLOCKS // 2] * count
        sharded = shard_geometry(geometry, kind, 0, count)
        self.controls, clients = [], []
        for address, size in zip(addresses, sizes, strict=True):
            self.controls.append(ControlClient(address, 10))
            reserved = self.controls[-1].reserve(reservation(sharded, 16 << 20))
            opened = self.controls[-1].open_session(
                session_of(reserved.reservation, size)
            )
            request = attach_request(opened, sharded)
            clients.append(NodeClient(address, request, 10.0, device=shared))
        self.nodes = RemoteAttention(
            clients,
            Partition(kind, tuple(sizes)),
            geometry,
            tolerate_loss=tolerate_loss,
        )
        self.exchange = CudaExchange(
            self.nodes, lambda: DeferredStreams(device), DeferredAttention(device)
        )
        trusted = DeferredDevice("early")
        # As builders have them: each reads one group's steps.
        self._readbacks = [
            CudaReadback(
                DeferredStreams(device if device.without is None else trusted), 16
            )
            for _ in geometry.groups
        ]
        self.readback = self._readbacks[0]
        self.impls = [
            AttentionOffloadImpl(
                LAYER.num_query_heads,
                LAYER.head_size,
                LAYER.softmax_scale,
                LAYER.num_kv_heads,
                sliding_window=layer.sliding_window or None,
                kv_sharing_target_layer_name=None if layer.stores else "another",
                sinks=sinks,
            )
            for layer in geometry.layers
        ]
        for index, impl in enumerate(self.impls):
            shape = geometry.layers[index]
            impl.connect(self.exchange, index, shape.k_scale, shape.v_scale)

    def run(self, steps: list[list[int]], decode_threshold: int = 1) -> float:
        """The largest error of any layer's output; NaN where something is missing."""
        results = []
        for num_new in steps:
            batch, qkv = self.requests.grow(list(num_new))
            groups = [
                AttentionOffloadMetadata(
                    readback.begin(_common(batch)),
                    BLOCK_SIZE,
                    decode_threshold=decode_threshold,
                )
                for readback in self._readbacks
            ]
            results.append((self.forward(*groups, qkv=qkv), self._expected()))
        self.exchange.close()
        self.device.finish()
        errors = [
            (output.double() - expected - self._spread * layer).abs().max()
            for outputs, expected_by_layer in results
            for layer, (output, expected) in enumerate(
                zip(outputs, expected_by_layer, strict=True)
            )
        ]
        return torch.stack(errors).max().item()

    def _expected(self) -> list[torch.Tensor]:
        return [
            self.requests.expected(layer, self._sinks)
            for layer in self._geometry.layers
        ]

    def forward(
        self, *groups: AttentionOffloadMetadata, qkv: tuple[torch.Tensor, ...]
    ) -> list[torch.Tensor]:
        """Outputs of all layers, once the device is finished."""
        return [
            self._layer(index, groups[layer.group], qkv)
            for index, layer in enumerate(self._geometry.layers)
        ]

    def _layer(
        self,
        index: int,
        metadata: AttentionOffloadMetadata,
        qkv: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        num_tokens = qkv[0].shape[0]
        inputs = (qkv[0], qkv[1], qkv[2] + self._spread * index)
        widths = [part[0].numel() for part in inputs]
        rows = torch.full((num_tokens + NUM_PADDING, sum(widths)), torch.nan)
        real = torch.cat([part.flatten(1) for part in inputs], dim=1)
        self.device.launch(lambda: rows[:num_tokens].copy_(real))
        parts = rows.split(widths, dim=1)
        if index:  # as rotary embeddings leave them; in the last layer k and v touch
            kv = torch.full_like(rows[:, widths[0] :], torch.nan)
            parts = (torch.full_like(parts[0], torch.nan), *kv.split(widths[1:], dim=1))
            if index == 1:
                parts = tuple(torch.full_like(part, torch.nan) for part in parts)
            pieces = real.split(widths, dim=1)
            for part, piece in zip(parts, pieces, strict=True):
                self.device.launch(lambda to=part, of=piece: to[:num_tokens].copy_(of))
        query, key, value = (part.unflatten(1, (-1, LAYER.head_size)) for part in parts)
        output = torch.full(query.shape, torch.nan)
        self.impls[index].forward(None, query, key, value, None, metadata, output)
        kept = torch.full(output.shape, torch.nan)
        self.device.launch(lambda: kept.copy_(output))
        # Whoever gets this memory next writes to it.
        for part in (query, key, value, output):
            self.device.launch(lambda used=part: used.fill_(torch.nan))
        return kept[:num_tokens]

    def close(self) -> None:
        """End the sessions."""
        self.nodes.close()
        for control in self.controls:
            control.close()


def _common(batch: StepMetadata) -> CommonAttentionMetadata:
    starts = torch.from_numpy(batch.query_start_loc)
    return CommonAttentionMetadata(
        query_start_loc=starts.clone(),
        query_start_loc_cpu=starts,
        seq_lens=torch.from_numpy(batch.seq_lens),
        num_reqs=len(batch.seq_lens),
        num_actual_tokens=batch.num_tokens + NUM_PADDING,
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(batch.seq_lens.max()) + 5,
        block_table_tensor=torch.from_numpy(batch.block_table),
        slot_mapping=torch.from_numpy(batch.slot_mapping),
    )


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize(
    ("kind", "num_nodes"), [("heads", 1), ("blocks", 2)], ids=["one-node", "two-nodes"]
)
def test_output_is_causal_attention(
    addresses: list[str], kind: PartitionKind, num_nodes: int, pace: Pace
) -> None:
    device = DeferredDevice(pace)
    worker = DeviceWorker(addresses[:num_nodes], device, kind)
    assert worker.run(STEPS) < 1e-5
    worker.close()


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize(
    ("kind", "num_nodes"), [("heads", 1), ("blocks", 2)], ids=["one-node", "two-nodes"]
)
@pytest.mark.parametrize("name", ["sinks", "window", "shared", "groups", "fp8"])
def test_kinds_of_layers(
    addresses: list[str], kind: PartitionKind, num_nodes: int, pace: Pace, name: str
) -> None:
    """Sinks take the log-sum-exp, windows hide rows, shared KV sends q only."""
    changes = {
        "sinks": [{}, {}, {}],
        "window": [{"sliding_window": 20}, {"sliding_window": 7}, {}],
        "shared": [{}, {}, {"storage": 0, "stores": False}],
        # Of a chunk with context one group only stores what the other attends with.
        "groups": [{"group": 1}, {"sliding_window": 1}, {"group": 1}],
        "fp8": [{}, {}, {"storage": 0, "stores": False}],
    }[name]
    layers = [
        msgspec.structs.replace(layer, **change)
        for layer, change in zip(GEOMETRY.layers, changes, strict=True)
    ]
    geometry = msgspec.structs.replace(
        GEOMETRY,
        layers=layers,
        groups=GEOMETRY.groups * (2 if name == "groups" else 1),
    )
    worker = DeviceWorker(
        addresses[:num_nodes],
        DeferredDevice(pace),
        kind,
        geometry=with_fp8(geometry) if name == "fp8" else geometry,
        sinks=torch.linspace(-1, 2, LAYER.num_query_heads) if name == "sinks" else None,
    )
    assert worker.run(STEPS) < 1e-5
    worker.close()


@pytest.mark.parametrize("without", ["fork", "join", "wait"])
def test_device_notices_what_is_missing(addresses: list[str], without: Order) -> None:
    """The test above is worth something: each order is needed."""
    device = DeferredDevice("late", without=without)
    worker = DeviceWorker(addresses[:1], device, "heads")
    assert not worker.run(STEPS) < 1e-5
    worker.close()


@pytest.mark.parametrize("rows", ["in-host-memory", "in-device-memory"])
@pytest.mark.parametrize("pace", PACES)
def test_micro_batches_take_turns(
    sharing: tuple[str, LaggingAttention], pace: Pace, rows: str
) -> None:
    """Each has streams and buffers of its own; one computes while the other waits."""
    device = DeferredDevice(pace)
    shared = HostDevice() if rows == "in-device-memory" else None
    worker = DeviceWorker([sharing[0]], device, "heads", shared)
    outputs: list[list[torch.Tensor]] = [[], []]
    expected = []
    for num_new in ([40, 20, 3], [1, 1, 1], [1, 1, 1]):
        batch, qkv = worker.requests.grow(num_new)
        if num_new[0] > 1:
            step = worker.readback.begin(_common(batch))
            worker.forward(AttentionOffloadMetadata(step, BLOCK_SIZE), qkv=qkv)
            continue
        expected.append(worker.requests.expected())
        parts = cut_batch(batch, 2)
        baton = Baton(lambda _: None)
        threads = [
            threading.Thread(
                target=_run_part,
                args=(worker, outputs[index], baton, index, parts[index], rows),
            )
            for index, rows in enumerate(zip(*(x.split(2) for x in qkv), strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    worker.exchange.close()
    device.finish()
    for step, whole in enumerate(expected):
        for layer in range(NUM_LAYERS):
            found = torch.cat([part[step * NUM_LAYERS + layer] for part in outputs])
            assert (found.double() - whole - layer).abs().max() < 1e-5
    assert bool(sharing[1].num_calls) == (shared is not None)
    worker.close()


@pytest.mark.parametrize("pace", PACES)
def test_rows_in_device_memory(
    sharing: tuple[str, LaggingAttention], pace: Pace
) -> None:
    """Decode steps cross in memory of the device, all others through the host."""
    address, attention = sharing
    worker = DeviceWorker([address], DeferredDevice(pace), "heads", HostDevice())
    assert worker.run(STEPS) < 1e-5
    num_decodes = sum(max(step) == 1 for step in STEPS)
    assert attention.num_calls == num_decodes * NUM_LAYERS
    worker.close()


@pytest.mark.parametrize("pace", PACES)
def test_verification_of_drafts(
    sharing: tuple[str, LaggingAttention], addresses: list[str], pace: Pace
) -> None:
    """Several rows of a request are a decode; beside chunks they have no local part."""
    address, attention = sharing
    steps = [*STEPS, [4, 1, 3], [4, 4, 4], [2, 17, 4], [0, 4, 0]]
    for nodes, kind in (([address], "heads"), (addresses, "blocks")):
        worker = DeviceWorker(nodes, DeferredDevice(pace), kind, HostDevice())
        assert worker.run(steps, decode_threshold=4) < 1e-5
        worker.close()
    num_decodes = sum(max(step) <= 4 for step in steps)
    assert attention.num_calls == num_decodes * NUM_LAYERS


def test_rows_in_device_memory_need_the_order(
    sharing: tuple[str, LaggingAttention],
) -> None:
    address, attention = sharing
    device = DeferredDevice("late", without="wait")
    worker = DeviceWorker([address], device, "heads", HostDevice())
    assert not worker.run([[1, 1, 1], [1, 1, 1]]) < 1e-5
    assert attention.num_calls
    worker.close()


def _run_part(
    worker: DeviceWorker,
    outputs: list[torch.Tensor],
    baton: Baton,
    index: int,
    batch: StepMetadata,
    qkv: tuple[torch.Tensor, ...],
) -> None:
    metadata = AttentionOffloadMetadata(HostStep(batch), BLOCK_SIZE, index)
    metadata.baton = baton
    baton.take(index)
    try:
        outputs += worker.forward(metadata, qkv=qkv)
    finally:
        baton.finish(index)


def test_padding_and_session_less_steps(addresses: list[str]) -> None:
    """Padding stays as it is; without a session attention is zero."""
    device = DeferredDevice("early")
    worker = DeviceWorker(addresses[:1], device, "heads")
    batch, (query, key, value) = worker.requests.grow([2, 1, 1])
    metadata = AttentionOffloadMetadata(
        worker.readback.begin(_common(batch)), BLOCK_SIZE
    )
    padded = [torch.cat((part, part[:NUM_PADDING])) for part in (query, key, value)]
    output = torch.full(padded[0].shape, 7.0)
    impl = worker.impls[0]
    impl.forward(None, *padded, None, metadata, output)
    assert (output[-NUM_PADDING:] == 7).all()
    impl.connect(None, 0)
    assert not impl.forward(None, *padded, None, metadata, output).any()
    worker.close()


def test_lost_store_is_reported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A layer that was only stored has no reply; the next step knows of its loss."""
    directory = tmp_path_factory.mktemp("node")
    node: NodeProcess
    with running_node(directory, "--kv-cache-gib", "0.25") as node:
        device = DeferredDevice("early")
        worker = DeviceWorker([node.address], device, "heads")
        worker.run([[20, 0, 0]])
        node.kill()
    batch, qkv = worker.requests.grow([1, 0, 0])
    metadata = AttentionOffloadMetadata(
        worker.readback.begin(_common(batch)), BLOCK_SIZE
    )
    with pytest.raises(MemoryNodeError):
        worker.forward(metadata, qkv=qkv)
    worker.close()


@pytest.mark.parametrize("tolerate_loss", [False, True])
def test_node_is_lost_with_rows_in_its_memory(
    sharing: tuple[str, LaggingAttention], tolerate_loss: bool
) -> None:
    """Its memory stays mapped; the step ends with an error, or with zeros."""
    address, attention = sharing
    device = DeferredDevice("late")
    worker = DeviceWorker(
        [address], device, "heads", HostDevice(), tolerate_loss=tolerate_loss
    )
    batch, qkv = worker.requests.grow([1, 1, 1])
    metadata = AttentionOffloadMetadata(
        worker.readback.begin(_common(batch)), BLOCK_SIZE
    )
    attention.end_session = True
    if not tolerate_loss:
        with pytest.raises(MemoryNodeError):
            worker.forward(metadata, qkv=qkv)
    else:
        outputs = worker.forward(metadata, qkv=qkv)
        device.finish()
        assert not torch.stack(outputs[1:]).any()
        assert worker.nodes.loss is not None
    worker.close()
