# SPDX-License-Identifier: Apache-2.0
"""Decode attention with the Triton kernels; here on the CPU, in the interpreter.

Slow, but it is what GPU nodes run: the same plan, the same kernels, the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.memory_node.decode_attention.payload_views import payload_views
from vllm_attn_offload.protocol.layer import DTYPE_BYTES, PayloadLayout
from vllm_attn_offload.protocol.messages import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata
from vllm_attn_offload.triton_kernels import (
    DecodeAttentionPlan,
    paged_decode_attention,
    plan_decode_attention,
    store_kv,
)
from vllm_attn_offload.triton_kernels.tiles import split_head_size

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: The kernels are made for this many query rows per request; prefill chunks are cut.
MAX_QUERY_LEN = 16


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a kernel plan depends on; layers of a group that share it share a plan."""

    num_query_heads: int
    num_kv_heads: int
    head_size: int
    v_head_size: int

    @classmethod
    def of(cls, layer: LayerGeometry) -> HeadShape:
        """Shape of a layer's heads."""
        return cls(
            layer.num_query_heads,
            layer.num_kv_heads,
            layer.head_size,
            layer.v_head_size,
        )


@dataclass(frozen=True, slots=True)
class Pool:
    """Blocks of one layer.

    ``key`` is ``[num_blocks, num_kv_heads, block_size, head_size]``, ``value`` likewise
    with ``v_head_size``.
    """

    layer: LayerGeometry
    shape: HeadShape
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step on the device.

    ``slot_mapping`` is int64 ``[num_tokens]``, ``block_table`` int32 ``[pieces,
    width]``. Steps of other micro-batches and sessions lie between this one's layers,
    so each step has kernel plans of its own.
    """

    num_tokens: int
    num_query_rows: int
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    plans: dict[HeadShape, DecodeAttentionPlan]


class TritonDecodeAttention(DecodeAttention):
    """The Triton kernels over blocks in ``device``'s memory."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def block_bytes(self, layer: LayerGeometry, block_size: int, dtype: str) -> int:
        """Bytes of K and V of one block.

        Raises:
            ValueError: The kernels cannot do the layer's head size.
        """
        for size in (layer.head_size, layer.v_head_size):
            split_head_size(size)
        row = layer.num_kv_heads * (layer.head_size + layer.v_head_size)
        return block_size * row * DTYPE_BYTES[dtype]

    def bind(
        self, geometry: SessionGeometry, layer: LayerGeometry, region: Any
    ) -> Pool:
        elements = self.view(region, geometry.dtype)
        block_size = geometry.groups[layer.group].block_size
        heads = layer.num_kv_heads
        sizes = [
            heads * block_size * size for size in (layer.head_size, layer.v_head_size)
        ]
        num_blocks = elements.numel() // sum(sizes)
        key, value = elements[: num_blocks * sum(sizes)].split(
            [num_blocks * size for size in sizes]
        )
        return Pool(
            layer=layer,
            shape=HeadShape.of(layer),
            key=key.view(num_blocks, heads, block_size, layer.head_size),
            value=value.view(num_blocks, heads, block_size, layer.v_head_size),
        )

    def view(self, region: Any, dtype: str) -> torch.Tensor:
        """A region's elements, flat."""
        return torch.frombuffer(region, dtype=TORCH_DTYPES[dtype])

    def plan(
        self, group: int, geometry: SessionGeometry, step: StepMetadata
    ) -> StepPlan:
        owner, starts, seq_lens = cut_queries(step)
        # Rounded up: every value is a variant of the kernels to compile.
        longest = 1 << (int(np.diff(starts).max(initial=1)) - 1).bit_length()
        shapes = {
            HeadShape.of(layer) for layer in geometry.layers if layer.group == group
        }
        return StepPlan(
            num_tokens=step.num_tokens,
            num_query_rows=step.num_query_rows,
            slot_mapping=self.to_device(torch.from_numpy(step.slot_mapping.copy())),
            block_table=self.to_device(torch.from_numpy(step.block_table[owner])),
            plans={
                shape: plan_decode_attention(
                    DecodeAttentionPlan(
                        max_num_seqs=max(1, len(owner)),
                        causal=False,
                        max_query_len=longest,
                        num_query_heads=shape.num_query_heads,
                        num_kv_heads=shape.num_kv_heads,
                        head_size=shape.head_size,
                        v_head_size=shape.v_head_size,
                        block_size=geometry.groups[group].block_size,
                        query_dtype=TORCH_DTYPES[geometry.dtype],
                        kv_cache_dtype=TORCH_DTYPES[geometry.dtype],
                        device=self.device,
                    ),
                    torch.from_numpy(starts),
                    torch.from_numpy(seq_lens),
                )
                for shape in shapes
            },
        )

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a step's table to where the kernels run."""
        return tensor

    def store(
        self, pool: object, plan: object, payload: memoryview, layout: PayloadLayout
    ) -> None:
        assert isinstance(pool, Pool)
        assert isinstance(plan, StepPlan)
        store_rows(pool, plan, payload, layout)

    def attend(
        self,
        pool: object,
        plan: object,
        payload: memoryview,
        layout: PayloadLayout,
        out: memoryview,
        lse: memoryview | None,
    ) -> None:
        assert isinstance(pool, Pool)
        assert isinstance(plan, StepPlan)
        heads = (plan.num_query_rows, pool.shape.num_query_heads)
        attend_rows(
            pool,
            plan,
            payload,
            layout,
            torch.frombuffer(out, dtype=pool.key.dtype).view(*heads, -1),
            torch.empty(heads)
            if lse is None
            else torch.frombuffer(lse, dtype=torch.float32).view(heads),
        )


def cut_queries(
    step: StepMetadata,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut requests into pieces of at most ``MAX_QUERY_LEN`` rows.

    Returns:
        For each piece its request, int64; ``[pieces + 1]`` int32 first rows; and int32
        tokens that it sees.
    """
    pieces = [
        (index, min(begin + MAX_QUERY_LEN, end))
        for index, (begin_of, end) in enumerate(_bounds(step))
        for begin in range(begin_of, end, MAX_QUERY_LEN)
    ]
    owner = np.array([index for index, _ in pieces], np.int64)
    ends = np.array([piece_end for _, piece_end in pieces], np.int32)
    starts = np.concatenate((np.zeros(1, np.int32), ends))
    return owner, starts, step.seq_lens[owner]


def _bounds(step: StepMetadata) -> Iterable[tuple[int, int]]:
    rows = step.query_start_loc.tolist()
    return zip(rows, rows[1:], strict=False)


def store_rows(
    pool: Pool,
    plan: StepPlan,
    payload: memoryview | torch.Tensor,
    layout: PayloadLayout,
) -> None:
    """Write the payload's k, v into the pool."""
    if plan.num_tokens:
        _, key, value = payload_views(payload, layout, pool.layer, pool.key.dtype)
        store_kv(key, value, pool.key, pool.value, plan.slot_mapping)


def attend_rows(
    pool: Pool,
    plan: StepPlan,
    payload: memoryview | torch.Tensor,
    layout: PayloadLayout,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Attend for the payload's q; fills ``out`` and ``lse``."""
    query, _, _ = payload_views(payload, layout, pool.layer, pool.key.dtype)
    paged_decode_attention(
        query,
        pool.key,
        pool.value,
        plan.plans[pool.shape],
        block_table=plan.block_table,
        softmax_scale=pool.layer.softmax_scale,
        out=out,
        lse=lse,
    )
