# SPDX-License-Identifier: Apache-2.0
"""Steps that verify drafts: several rows of a request are attended on the nodes."""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from raw_session import attach_request, make_geometry, reservation, session_of
from worker_batch import WorkerBatch

from vllm_attn_offload.attention.cpu_exchange import CpuExchange
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.attention.readback import HostStep
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.partition import (
    Partition,
    PartitionKind,
    shard_geometry,
)
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.client.step_partition import partition_step
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata

NUM_BLOCKS, BLOCK_SIZE, NUM_REQS = 120, 16, 3
#: Three drafts and the token before them.
THRESHOLD = 4
WINDOWS = {
    "full": (0, 0),
    "window": (33, 33),
    "short windows": (1, 3),
    "mixed": (0, 20),
}


def geometry_of(windows: tuple[int, ...]) -> SessionGeometry:
    """Two layers of one group with these windows; 0: none."""
    whole = make_geometry(num_query_heads=4, num_kv_heads=2, head_size=32)
    layers = [
        structs.replace(layer, sliding_window=window)
        for layer, window in zip(whole.layers, windows, strict=True)
    ]
    return structs.replace(whole, layers=layers)


class Worker:
    """Requests whose last tokens may be taken back, over sessions on several nodes."""

    def __init__(
        self,
        addresses: list[str],
        geometry: SessionGeometry,
        kind: PartitionKind,
    ) -> None:
        self._geometry = geometry
        self.batch = WorkerBatch(geometry, NUM_BLOCKS, NUM_REQS)
        count = len(addresses)
        share = NUM_BLOCKS // count if kind == "blocks" else NUM_BLOCKS
        self._controls, clients = [], []
        for node, address in enumerate(addresses):
            sharded = shard_geometry(geometry, kind, node, count)
            control = ControlClient(address, 10)
            self._controls.append(control)
            reserved = control.reserve(reservation(sharded, 8 << 20))
            opened = control.open_session(session_of(reserved.reservation, share))
            clients.append(NodeClient(address, attach_request(opened, sharded), 10.0))
        partition = Partition(kind, (share,) * count)
        self._nodes = RemoteAttention(clients, partition, geometry)
        self._exchange = CpuExchange(self._nodes)

    def step(self, num_new: list[int], num_rejected: list[int]) -> float:
        """Run a step on both layers; the largest error of rows that are kept.

        Args:
            num_new: Rows per request.
            num_rejected: How many of them, the last ones, are not stored.
        """
        step, (query, key, value) = self.batch.grow(num_new)
        lens = [count for count in num_new if count]
        rejected = [r for r, count in zip(num_rejected, num_new, strict=True) if count]
        ends = np.cumsum(lens)
        slots = step.slot_mapping.copy()
        is_kept = torch.ones(len(slots), dtype=torch.bool)
        for end, count in zip(ends, rejected, strict=True):
            slots[end - count : end] = -1
            is_kept[end - count : end] = False
        metadata = AttentionOffloadMetadata(
            HostStep(replace(step, slot_mapping=slots)),
            BLOCK_SIZE,
            decode_threshold=THRESHOLD,
        )
        errors = []
        for index, layer in enumerate(self._geometry.layers):
            output = torch.full(query.shape, torch.nan)
            attention = LayerAttention(layer.softmax_scale, layer.sliding_window)
            rows = (query, key, value)
            self._exchange.attend(metadata, index, rows, output, attention)
            assert torch.isfinite(output).all()
            exact = self.batch.expected(layer)
            errors.append(float((output - exact)[is_kept].abs().max()))
        self.batch.reject(num_rejected)
        return max(errors)

    def close(self) -> None:
        self._nodes.close()
        for control in self._controls:
            control.close()


#: New rows of each request, and how many of them were rejected drafts.
Steps = list[list[tuple[int, int]]]


@st.composite
def request_rows(draw: st.DrawFn) -> tuple[int, int]:
    num_rows = draw(st.sampled_from([0, 1, 2, 3, 4, 4, 4, 5, 17, 40]))
    return num_rows, draw(st.integers(0, max(0, min(num_rows, THRESHOLD) - 1)))


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize(
    ("kind", "num_nodes"), [("heads", 1), ("heads", 2), ("blocks", 3)]
)
@given(data=st.data())
@settings(deadline=None, max_examples=6)
def test_rows_are_exact(
    poisoned_addresses: list[str],
    kind: PartitionKind,
    num_nodes: int,
    windows: str,
    data: st.DataObject,
) -> None:
    """Beside chunks with and without context; rejected rows leave nothing behind."""
    one = st.lists(request_rows(), min_size=NUM_REQS, max_size=NUM_REQS)
    used = poisoned_addresses[:num_nodes]
    with closing(Worker(used, geometry_of(WINDOWS[windows]), kind)) as worker:
        assert worker.step([40, 3, 20], [0, 0, 0]) < 2e-5
        for rows in data.draw(st.lists(one, min_size=1, max_size=6)):
            if any(count for count, _ in rows):
                num_new, num_rejected = map(list, zip(*rows, strict=True))
                assert worker.step(num_new, num_rejected) < 2e-5


def decode_step(query_lens: list[int], seq_lens: list[int]) -> StepMetadata:
    """Requests in blocks of their own."""
    lens = np.array(seq_lens, np.int32)
    width = -(-int(lens.max()) // BLOCK_SIZE)
    table = np.arange(lens.size * width, dtype=np.int32).reshape(lens.size, width)
    positions = [range(s - q, s) for q, s in zip(query_lens, seq_lens, strict=True)]
    slots = [
        int(row[p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE
        for row, its_own in zip(table, positions, strict=True)
        for p in its_own
    ]
    return StepMetadata.whole(
        np.array([0, *itertools.accumulate(query_lens)], np.int32),
        lens,
        np.array(slots, np.int64),
        table,
    )


def test_verification_is_one_message() -> None:
    """No request is a prefill: nothing is attended here, and nothing merged."""
    batch = decode_step([4, 1, 3], [100, 7, 3])
    plan = partition_step(batch, Partition("heads", (99,)), BLOCK_SIZE, 0, THRESHOLD)
    assert plan.prefills == ()
    assert plan.remote_rows is None
    assert not plan.needs_merge
    assert plan.shares[0].step == batch
    chunk = decode_step([5, 1, 3], [100, 7, 3])
    plan = partition_step(chunk, Partition("heads", (99,)), BLOCK_SIZE, 0, THRESHOLD)
    assert [(p.begin, p.end) for p in plan.prefills] == [(0, 5)]


def test_blocks_cover_the_window_of_the_first_row() -> None:
    """The last row's window begins a block later."""
    batch = decode_step([4], [82])
    (share,) = partition_step(
        batch, Partition("heads", (99,)), BLOCK_SIZE, 33, THRESHOLD
    ).shares
    # Rows 78 to 81 see tokens from 46, 47, 48 and 49 on.
    assert share.step.first_block.tolist() == [2]
    assert share.step.block_table.shape == (1, 4)


def test_rows_without_a_slot_are_not_seen() -> None:
    """Only a drafter has them, behind those of a request that are used."""
    batch = decode_step([4, 4, 1], [34, 40, 9])
    batch.slot_mapping[2:4] = -1
    batch.slot_mapping[8] = -1
    (share,) = partition_step(
        batch, Partition("heads", (99,)), BLOCK_SIZE, 0, THRESHOLD
    ).shares
    assert share.step.seq_lens.tolist() == [32, 40, 9]
    assert share.step.query_positions.tolist() == [30, 36, 8]
