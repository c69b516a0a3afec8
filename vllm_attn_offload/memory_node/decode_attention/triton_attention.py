# SPDX-License-Identifier: Apache-2.0
"""Decode attention with the Triton kernels; here on the CPU, in the interpreter.

Slow, but it is what GPU nodes run: the same plan, the same kernels, the same blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vllm_attn_offload.memory_node.decode_attention.base import (
    DecodeAttention,
    LayerCall,
    PlanT,
)
from vllm_attn_offload.memory_node.decode_attention.kernel_plan import (
    TORCH_DTYPES,
    HeadShape,
    KernelPlan,
)
from vllm_attn_offload.memory_node.decode_attention.payload_views import payload_views
from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.layer import PayloadLayout
from vllm_attn_offload.protocol.step import StepMetadata
from vllm_attn_offload.triton_kernels import paged_decode_attention, store_kv
from vllm_attn_offload.triton_kernels.tiles import split_head_size


@dataclass(frozen=True, slots=True)
class Pool:
    """Blocks of one layer.

    ``dtype`` is that of payloads and results. ``key`` is ``[num_blocks, num_kv_heads,
    block_size, head_size]``, ``value`` likewise with ``v_head_size``. ``scales``, by
    the kernels' argument, are fp32 ``[1]`` where blocks are of fp8, else None;
    ``scale_pointers`` are their addresses, by the kernels' parameter. ``slopes`` are
    fp32 ``[num_query_heads]``, if there are any.
    """

    layer: LayerGeometry
    shape: HeadShape
    dtype: torch.dtype
    key: torch.Tensor
    value: torch.Tensor
    scales: dict[str, torch.Tensor | None]
    scale_pointers: dict[str, int]
    slopes: torch.Tensor | None


class TritonKernels(DecodeAttention[Pool, PlanT]):
    """Blocks of the Triton kernels in the memory of one device."""

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
        return block_size * row * TORCH_DTYPES[dtype].itemsize

    def bind(
        self,
        geometry: SessionGeometry,
        layer: LayerGeometry,
        region: Any,
        block_stride: int,
    ) -> Pool:
        elements = self.view(region, geometry.block_dtype)
        block_size = geometry.groups[layer.group].block_size
        num_blocks, stride = (
            len(region) // block_stride,
            block_stride // elements.element_size(),
        )
        shape, parts, offset = (layer.num_kv_heads, block_size), [], 0
        for size in (layer.head_size, layer.v_head_size):
            strides = (stride, block_size * size, size, 1)
            parts.append(
                elements.as_strided((num_blocks, *shape, size), strides, offset)
            )
            offset += math.prod(shape) * size
        slopes = None
        if layer.alibi_slopes:
            slopes = torch.tensor(layer.alibi_slopes, device=self.device)
        scales = self._scales(geometry, layer)
        return Pool(
            layer=layer,
            shape=HeadShape.of(layer),
            dtype=TORCH_DTYPES[geometry.dtype],
            key=parts[0],
            value=parts[1],
            scales=scales,
            scale_pointers={
                f"{name}_ptr": scale.data_ptr()
                for name, scale in scales.items()
                if scale is not None
            },
            slopes=slopes,
        )

    def _scales(
        self, geometry: SessionGeometry, layer: LayerGeometry
    ) -> dict[str, torch.Tensor | None]:
        """The kernels' arguments for them."""
        scales = {"k_scale": layer.k_scale, "v_scale": layer.v_scale}
        if geometry.kv_dtype is None:
            return dict.fromkeys(scales)
        return {
            name: torch.tensor([scale], dtype=torch.float32, device=self.device)
            for name, scale in scales.items()
        }

    def view(self, region: Any, dtype: str) -> torch.Tensor:
        """A region's elements, flat."""
        return torch.frombuffer(region, dtype=TORCH_DTYPES[dtype])


class TritonDecodeAttention(TritonKernels[KernelPlan]):
    """The Triton kernels over blocks in host memory, in the interpreter."""

    #: Query rows x heads x tokens of a launch: a tenth of a second of the interpreter.
    max_scores = 1 << 16

    def plan(
        self,
        group: int,
        geometry: SessionGeometry,
        step: StepMetadata,
        previous: KernelPlan | None,
        *,
        on_half: bool = False,
    ) -> KernelPlan:
        plan = previous or KernelPlan(group, geometry, self.device, self.max_scores)
        plan.fill(step)
        return plan

    def store(
        self, pool: Pool, plan: KernelPlan, call: LayerCall, first: int, last: int
    ) -> None:
        store_rows(pool, plan, call.payload, call.layout, slice(first, last))

    def attend(
        self, pool: Pool, plan: KernelPlan, call: LayerCall, slice_s: float = 0.0
    ) -> bool:
        heads = (plan.num_query_rows, pool.shape.num_query_heads)
        attend_rows(
            pool,
            plan,
            call.payload,
            call.layout,
            torch.frombuffer(call.out, dtype=pool.dtype).view(*heads, -1),
            torch.empty(heads)
            if call.lse is None
            else torch.frombuffer(call.lse, dtype=torch.float32).view(heads),
        )
        return plan.num_done == 0


def store_rows(
    pool: Pool,
    plan: KernelPlan,
    payload: memoryview | torch.Tensor,
    layout: PayloadLayout,
    rows: slice = slice(None),
) -> None:
    """Write rows of k and v of the payload, uint8 ``[num_bytes]``, into the pool."""
    if layout.num_tokens:
        _, key, value = payload_views(payload, layout, pool.layer, pool.dtype)
        slots = plan.slot_mapping[rows]
        store_kv(key[rows], value[rows], pool.key, pool.value, slots, **pool.scales)


def attend_rows(
    pool: Pool,
    plan: KernelPlan,
    payload: memoryview | torch.Tensor,
    layout: PayloadLayout,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Attend for the payload's q, or for the rows of the plan's next part.

    Args:
        pool: Blocks of the layer.
        plan: Planned step.
        payload: ``[num_bytes]``, or ``[num_elements]`` of the payloads' dtype.
        layout: Where q, k and v lie in it.
        out: ``[num_query_rows, num_query_heads, v_head_size]``; filled.
        lse: ``[num_query_rows, num_query_heads]`` float32; filled.
    """
    query, _, _ = payload_views(payload, layout, pool.layer, pool.dtype)
    if plan.num_parts > 1:
        rows = plan.fill_part()
        query, out, lse = query[rows], out[rows], lse[rows]
    plan.num_done = (plan.num_done + 1) % plan.num_parts
    paged_decode_attention(
        query,
        pool.key,
        pool.value,
        plan.by_shape[pool.shape],
        block_table=plan.block_table,
        block_positions=plan.block_positions,
        softmax_scale=pool.layer.softmax_scale,
        soft_cap=pool.layer.soft_cap or None,
        alibi_slopes=pool.slopes,
        **pool.scales,
        out=out,
        lse=lse,
    )
