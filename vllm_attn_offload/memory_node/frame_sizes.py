# SPDX-License-Identifier: Apache-2.0
"""Sizes of one session's frames, from its layers and the largest step."""

from __future__ import annotations

import os
from collections import defaultdict

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.layer import DTYPE_BYTES, PayloadLayout, TokenLayout
from vllm_attn_offload.protocol.messages import OpenSession
from vllm_attn_offload.protocol.step import StepLimits
from vllm_attn_offload.transport.cuda_memory import DeviceRows, SharedDevice

MAX_MICRO_BATCHES = 2
_MAX_ERROR_BYTES = 1 << 16
#: A kernel's plan keeps 12 bytes of a block-table entry, 32 of a query row and KV head,
#: 8 of a stored row; its arrays may have grown to twice of what they hold.
_PLAN_BYTES_PER_ENTRY = 24
_PLAN_BYTES_PER_HEAD = 64
_PLAN_BYTES_PER_ROW = 32
#: Per CPU of the node: parts of 32 rows that wait for their merge, and one that paused.
_PARTS_PER_CPU = 9
#: In device memory decode steps of large batches fit; prefills need not.
_MAX_ROWS_BYTES = 16 << 20


class FrameSizes:
    """Sizes and layouts of a session's frames.

    Args:
        geometry: Layers of the session.
        opened: Pool size and the largest step.

    Attributes:
        limits: Limits of a STEP, by KV cache group.
        out_row_bytes: Bytes of a query row's output, by layer.
        lse_row_bytes: Bytes of a query row's log-sum-exp, by layer.
        kinds: Equal numbers for layers whose payloads have one layout.
    """

    def __init__(self, geometry: SessionGeometry, opened: OpenSession) -> None:
        self._rows = [TokenLayout.of(layer) for layer in geometry.layers]
        self._stores = [layer.stores for layer in geometry.layers]
        self._shapes = _planned_shapes(geometry)
        self._item_bytes = DTYPE_BYTES[geometry.dtype]
        self._max_reqs = opened.max_num_reqs
        self._max_tokens = opened.max_num_tokens
        layouts = list(zip(self._rows, self._stores, strict=True))
        self.kinds = [layouts.index(layout) for layout in layouts]
        self.out_row_bytes = [rows.out * self._item_bytes for rows in self._rows]
        self.lse_row_bytes = [4 * layer.num_query_heads for layer in geometry.layers]
        self.limits = [
            StepLimits(
                num_blocks=opened.num_blocks,
                block_size=group.block_size,
                max_num_tokens=opened.max_num_tokens,
                max_num_reqs=opened.max_num_reqs,
                max_blocks_per_req=opened.max_blocks_per_req,
            )
            for group in geometry.groups
        ]

    @property
    def _max_row_bytes(self) -> int:
        return max(rows.width for rows in self._rows) * self._item_bytes

    def longest(self) -> tuple[int, int]:
        """Bytes of the longest payload of a request and of a reply."""
        steps = max(limits.max_step_bytes for limits in self.limits)
        reply_row = max(self.out_row_bytes) + max(self.lse_row_bytes)
        return (
            max(steps, self._max_tokens * self._max_row_bytes),
            max(_MAX_ERROR_BYTES, self._max_tokens * reply_row),
        )

    @property
    def plan_bytes(self) -> int:
        """Most memory that checked STEPs and their plans keep on the host.

        A plan keeps entries of blocks that the pool has, once for each kind of layers.
        """
        steps = sum(each.max_step_bytes for each in self.limits)
        return steps + MAX_MICRO_BATCHES * sum(map(self._one_plan_bytes, self._shapes))

    def _one_plan_bytes(self, layer: LayerGeometry) -> int:
        limits = self.limits[layer.group]
        width = min(limits.max_blocks_per_req, limits.num_blocks)
        part_bytes = 32 * 4 * (layer.v_head_size + 2)
        return (
            _PLAN_BYTES_PER_ENTRY * limits.max_num_reqs * width
            + _PLAN_BYTES_PER_HEAD * limits.max_num_tokens * layer.num_kv_heads
            + _PLAN_BYTES_PER_ROW * (limits.max_num_tokens + limits.max_num_reqs)
            + _PARTS_PER_CPU * len(os.sched_getaffinity(0)) * part_bytes
        )

    def device_rows(self, device: SharedDevice) -> DeviceRows:
        """Memory of ``device`` for the rows of decode steps."""
        request_bytes, reply_bytes = (
            min(self._max_reqs * row_bytes, _MAX_ROWS_BYTES)
            for row_bytes in (self._max_row_bytes, max(self.out_row_bytes))
        )
        return DeviceRows(device, request_bytes, reply_bytes)

    def layout(
        self, layer: int, num_query_rows: int, num_tokens: int, *, is_fused: bool
    ) -> PayloadLayout:
        """Layout of a LAYER payload: of q alone where the layer stores nothing.

        Raises:
            ProtocolError: Fused rows, but not every token queries, or none is stored.
        """
        rows = self._rows[layer]
        if not self._stores[layer]:
            if is_fused:
                raise ProtocolError(f"fused rows for layer {layer}, which sends only q")
            num_tokens = 0
        if not is_fused:
            return PayloadLayout.planar(
                rows, num_query_rows, num_tokens, self._item_bytes
            )
        if num_query_rows != num_tokens:
            raise ProtocolError(
                f"fused rows for {num_query_rows:,} query rows and {num_tokens:,} "
                "tokens"
            )
        return PayloadLayout.fused(rows, num_tokens, self._item_bytes)


def _planned_shapes(geometry: SessionGeometry) -> list[LayerGeometry]:
    """A layer for each plan of a step: it suits all with its heads, window and blocks.

    Blocks of one shape lie further apart where larger ones share the storage.
    """
    in_storage: dict[int, set[tuple[int, int, int, int]]] = defaultdict(set)
    for layer in geometry.layers:
        block_size = geometry.groups[layer.group].block_size
        block = (block_size, layer.num_kv_heads, layer.head_size, layer.v_head_size)
        in_storage[layer.storage].add(block)
    shapes = {}
    for layer in geometry.layers:
        heads = (layer.num_query_heads, layer.num_kv_heads)
        sizes = (layer.head_size, layer.v_head_size, layer.sliding_window)
        blocks = frozenset(in_storage[layer.storage])
        shapes[layer.group, heads, sizes, blocks] = layer
    return list(shapes.values())
