# SPDX-License-Identifier: Apache-2.0
"""Windows, caps, slopes, sinks, shared KV and several KV groups, on real nodes.

Blocks that fell out of a window, and the null block, hold NaN before the next step.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from raw_session import attach_request, reservation, session_of
from stored_kv import with_fp8
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
from vllm_attn_offload.protocol.geometry import (
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)
from vllm_attn_offload.protocol.step import StepMetadata

NUM_BLOCKS, BLOCK_SIZE, NUM_REQS = 120, 16, 3
HEADS, KV_HEADS, SIZE = 4, 2, 32
SLOPES = (0.25, 0.0625, 0.015625, 0.00390625)
#: Chunks with and without context, decodes, contexts of many windows.
STEPS = [[40, 3, 1], [25, 1, 1], [1, 17, 0], [70, 1, 33], [1, 1, 1], [0, 30, 1]]
STEPS += [[1, 1, 1], [16, 1, 1], [1, 1, 40], [1, 1, 1]]


def layer(index: int, **changes: Any) -> LayerGeometry:
    values: dict[str, Any] = {
        "name": f"layers.{index}",
        "group": 0,
        "storage": index,
        "num_query_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_size": SIZE,
        "v_head_size": SIZE,
        "softmax_scale": SIZE**-0.5,
    }
    return LayerGeometry(**(values | changes))


def one_group(*layers: dict[str, Any]) -> SessionGeometry:
    kinds = [layer(index, **changes) for index, changes in enumerate(layers)]
    return SessionGeometry("float32", [KVGroup(BLOCK_SIZE)], kinds)


#: Layers of a group, or of two that share a storage.
KINDS = {
    "window": one_group({"sliding_window": 33}, {"sliding_window": 33}),
    "window of one": one_group({"sliding_window": 1}, {"sliding_window": 1}),
    "windows in one group": one_group({}, {"sliding_window": 20}),
    "cap": one_group({"soft_cap": 2.0}, {"soft_cap": 2.0, "sliding_window": 50}),
    "slopes": one_group({"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES}),
    "other heads": one_group({}, {"num_query_heads": 8, "sliding_window": 9}),
    "shared KV": one_group({"sliding_window": 33}, {"storage": 0, "stores": False}),
    "two groups": SessionGeometry(
        "float32",
        [KVGroup(BLOCK_SIZE), KVGroup(2 * BLOCK_SIZE)],
        [layer(0, sliding_window=33), layer(1, group=1, storage=0)],
    ),
}
KINDS["fp8"] = with_fp8(one_group({"sliding_window": 33}, {"soft_cap": 2.0}, {}))
KINDS["fp8, shared KV"] = with_fp8(KINDS["shared KV"])


class Worker:
    """Requests in the KV groups of a worker, over sessions on several nodes."""

    def __init__(
        self,
        addresses: list[str],
        geometry: SessionGeometry,
        kind: PartitionKind,
    ) -> None:
        self._geometry = geometry
        num_nodes, num_groups = len(addresses), len(geometry.groups)
        free = np.random.default_rng(0).permutation(np.arange(1, NUM_BLOCKS))
        self.groups = [
            WorkerBatch(
                geometry,
                NUM_BLOCKS,
                NUM_REQS,
                np.array_split(free, num_groups)[group].tolist(),
                group,
            )
            for group in range(num_groups)
        ]
        share = NUM_BLOCKS // num_nodes if kind == "blocks" else NUM_BLOCKS
        self._controls, clients = [], []
        for node, address in enumerate(addresses):
            sharded = shard_geometry(geometry, kind, node, num_nodes)
            control = ControlClient(address, 10)
            self._controls.append(control)
            reserved = control.reserve(reservation(sharded, 8 << 20))
            opened = control.open_session(session_of(reserved.reservation, share))
            clients.append(NodeClient(address, attach_request(opened, sharded), 10.0))
        self._nodes = RemoteAttention(
            clients, Partition(kind, (share,) * num_nodes), geometry
        )
        self._exchange = CpuExchange(self._nodes)

    def poison(self, group: int, blocks: list[int]) -> None:
        """Store NaN in the group's blocks, in all of its layers."""
        size = self._geometry.groups[group].block_size
        slots = np.array([b * size + i for b in blocks for i in range(size)], np.int64)
        batch = StepMetadata.whole(
            np.array([0, slots.size], np.int32),
            np.array([slots.size], np.int32),
            slots,
            np.zeros((1, -(-slots.size // size)), np.int32),
        )
        step = self._nodes.begin_step(batch, 0, group)
        for index, each in enumerate(self._geometry.layers):
            if each.group == group and each.stores:
                query = torch.zeros(slots.size, each.num_query_heads, SIZE)
                rows = torch.full((slots.size, KV_HEADS, SIZE), torch.nan)
                self._nodes.post_layer(step, index, query, rows, rows)
                self._nodes.collect(step, index, query[:0])

    def step(self, num_new: list[int], sinks: torch.Tensor | None) -> float:
        """Run a step on all layers; the largest error of the outputs."""
        steps = [batch.grow(num_new) for batch in self.groups]
        sent = [
            AttentionOffloadMetadata(
                HostStep(step),
                group.block_size,
                layer_name=next(
                    each.name for each in self._geometry.layers if each.group == index
                ),
            )
            for index, ((step, _), group) in enumerate(
                zip(steps, self._geometry.groups, strict=True)
            )
        ]
        for step, later in itertools.pairwise(sent):
            step.later = later
        errors = []
        for index, each in enumerate(self._geometry.layers):
            query, key, value = steps[each.group][1]
            # More heads than the first layer has see the same tokens again.
            query = query.repeat(1, each.num_query_heads // HEADS, 1)
            output = torch.full(query.shape, torch.nan)
            shown = (key, value) if each.stores else (None, None)
            attention = LayerAttention(
                each.softmax_scale,
                each.sliding_window,
                each.soft_cap,
                torch.tensor(each.alibi_slopes) if each.alibi_slopes else None,
                sinks,
                each.k_scale,
                each.v_scale,
            )
            self._exchange.attend(
                sent[each.group], index, (query, *shown), output, attention
            )
            exact = self.groups[each.group].expected(each, sinks)
            errors.append(float((output - exact).abs().max()))
        return max(errors)

    def close(self) -> None:
        self._nodes.close()
        for control in self._controls:
            control.close()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("kind", "num_nodes"), [("heads", 1), ("heads", 2), ("blocks", 2), ("blocks", 3)]
)
def test_output_is_exact(
    poisoned_addresses: list[str], kind: PartitionKind, num_nodes: int, name: str
) -> None:
    """With sinks in every other step, though what is stored does not depend on them."""
    geometry = KINDS[name]
    worker = Worker(poisoned_addresses[:num_nodes], geometry, kind)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    has_sinks = all(each.num_query_heads == HEADS for each in geometry.layers)
    for index, num_new in enumerate(STEPS):
        given = sinks if has_sinks and index % 2 else None
        assert worker.step(num_new, given) < 2e-5
        for group, batch in enumerate(worker.groups):
            windows = {
                each.sliding_window for each in geometry.layers if each.group == group
            }
            released = [] if 0 in windows else batch.release(max(windows))
            worker.poison(group, [0, *released])
    worker.close()


@pytest.mark.parametrize("seq_len", [100, 1 << 17])
@pytest.mark.parametrize(("window", "num_rows"), [(128, 1), (128, 64), (33, 7)])
def test_step_bytes_do_not_grow_with_the_context(
    seq_len: int, window: int, num_rows: int
) -> None:
    num_blocks = -(-seq_len // BLOCK_SIZE)
    batch = StepMetadata.whole(
        np.array([0, num_rows], np.int32),
        np.array([seq_len], np.int32),
        np.arange(num_rows, dtype=np.int64),
        np.arange(num_blocks, dtype=np.int32)[None],
    )
    whole = Partition("heads", (num_blocks,))
    divided = Partition("blocks", (num_blocks // 2, num_blocks - num_blocks // 2))
    limit = -(-(window + num_rows) // BLOCK_SIZE) + 2
    for partition in (whole, divided):
        plan = partition_step(batch, partition, BLOCK_SIZE, window)
        for share in plan.shares:
            assert share.step.block_table.shape[1] <= limit
