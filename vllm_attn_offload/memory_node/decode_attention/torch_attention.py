# SPDX-License-Identifier: Apache-2.0
"""Decode attention in plain torch: gathers each request's blocks, then attends.

Works on every CPU without a compiler; the compiled kernel replaces it where it exists.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_attn_offload.memory_node.decode_attention.base import (
    DecodeAttention,
    LayerCall,
)
from vllm_attn_offload.memory_node.decode_attention.payload_views import payload_views
from vllm_attn_offload.memory_node.decode_attention.request_parts import (
    RequestPart,
    StepRequest,
    parts_of,
    requests_of,
)
from vllm_attn_offload.protocol.e4m3 import to_e4m3
from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata

_TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class _Pool:
    """K is [num_blocks, block_size, num_kv_heads, head_size], V has v_head_size.

    ``dtype`` is that of payloads; blocks may be of fp8 instead. ``slopes`` is fp32
    ``[num_kv_heads, group, 1, 1]``, if there are any.
    """

    layer: LayerGeometry
    dtype: torch.dtype
    key: torch.Tensor
    value: torch.Tensor
    slopes: torch.Tensor | None


@dataclass(slots=True)
class _KernelPlan:
    """One step: int64 rows, blocks and offsets ``[num_stored]`` to store; its requests.

    ``next_part`` and then ``parts`` are left of an unfinished layer, and made when they
    are needed: a request may have very many. ``partial`` is the output of a request's
    earlier parts, fp32, and its log-sum-exp.
    """

    stored_rows: torch.Tensor
    stored_blocks: torch.Tensor
    stored_offsets: torch.Tensor
    requests: tuple[StepRequest, ...]
    parts: Iterator[RequestPart] | None = None
    next_part: RequestPart | None = None
    partial: tuple[torch.Tensor, torch.Tensor] | None = None


class TorchDecodeAttention(DecodeAttention[_Pool, _KernelPlan]):
    """The kernel that needs nothing but torch."""

    name = "torch"

    def block_bytes(self, layer: LayerGeometry, block_size: int, dtype: str) -> int:
        row = layer.num_kv_heads * (layer.head_size + layer.v_head_size)
        return block_size * row * _TORCH_DTYPES[dtype].itemsize

    def bind(
        self,
        geometry: SessionGeometry,
        layer: LayerGeometry,
        region: mmap.mmap,
        block_stride: int,
    ) -> _Pool:
        elements = torch.frombuffer(region, dtype=_TORCH_DTYPES[geometry.block_dtype])
        stride, heads = block_stride // elements.itemsize, layer.num_kv_heads
        shape = (len(region) // block_stride, geometry.groups[layer.group].block_size)
        parts, offset = [], 0
        for size in (layer.head_size, layer.v_head_size):
            strides = (stride, heads * size, size, 1)
            parts.append(elements.as_strided((*shape, heads, size), strides, offset))
            offset += shape[1] * heads * size
        slopes = torch.tensor(layer.alibi_slopes).view(-1, 1, 1)
        return _Pool(
            layer=layer,
            dtype=_TORCH_DTYPES[geometry.dtype],
            key=parts[0],
            value=parts[1],
            slopes=slopes.unflatten(0, (heads, -1)) if layer.alibi_slopes else None,
        )

    def plan(
        self,
        group: int,
        geometry: SessionGeometry,
        step: StepMetadata,
        previous: _KernelPlan | None,
        *,
        on_half: bool = False,
    ) -> _KernelPlan:
        block_size = geometry.groups[group].block_size
        slots = torch.from_numpy(step.slot_mapping.copy())
        stored = (slots >= 0).nonzero().flatten()
        slots = slots[stored]
        return _KernelPlan(
            stored_rows=stored,
            stored_blocks=slots // block_size,
            stored_offsets=slots % block_size,
            requests=requests_of(step, block_size),
        )

    def store(
        self, pool: _Pool, plan: _KernelPlan, call: LayerCall, first: int, last: int
    ) -> None:
        _, key, value = payload_views(call.payload, call.layout, pool.layer, pool.dtype)
        begin, end = torch.searchsorted(plan.stored_rows, torch.tensor([first, last]))
        rows = plan.stored_rows[begin:end]
        slots = (plan.stored_blocks[begin:end], plan.stored_offsets[begin:end])
        layer = pool.layer
        pool.key[slots] = _stored(key[rows], pool.key.dtype, layer.k_scale)
        pool.value[slots] = _stored(value[rows], pool.key.dtype, layer.v_scale)

    def attend(
        self, pool: _Pool, plan: _KernelPlan, call: LayerCall, slice_s: float = 0.0
    ) -> bool:
        query, _, _ = payload_views(call.payload, call.layout, pool.layer, pool.dtype)
        outs = torch.frombuffer(call.out, dtype=pool.dtype).view(
            *query.shape[:2], pool.layer.v_head_size
        )
        lses = None
        if call.lse is not None:
            lses = torch.frombuffer(call.lse, dtype=torch.float32).view(query.shape[:2])
        until = time.perf_counter() + slice_s if slice_s else math.inf
        parts = plan.parts or parts_of(plan.requests, pool.layer, pool.key.shape[1])
        part = plan.next_part or next(parts, None)
        plan.parts = plan.next_part = None
        while part is not None:
            rows = slice(part.begin, part.end)
            out, lse = _merged(plan.partial, *_attend_part(pool, part, query[rows]))
            plan.partial = None if part.is_last else (out, lse)
            if part.is_last:
                outs[rows] = out
                if lses is not None:
                    lses[rows] = lse
            part = next(parts, None)
            if part is not None and time.perf_counter() > until:
                plan.parts, plan.next_part = parts, part
                return False
        return True


def _stored(rows: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Rows of k or v as blocks hold them."""
    return to_e4m3(rows, scale) if dtype == torch.float8_e4m3fn else rows


def _attend_part(
    pool: _Pool, part: RequestPart, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend for rows of one request; the query heads of a KV head become rows.

    Returns:
        fp32 ``[num_rows, num_heads, v_head_size]`` and ``[num_rows, num_heads]``.
    """
    num_rows, num_heads, head_size = query.shape
    layer, num_kv_heads = pool.layer, pool.layer.num_kv_heads
    if not len(part.blocks):
        out = torch.zeros(num_rows, num_heads, layer.v_head_size)
        return out, torch.full((num_rows, num_heads), -torch.inf)
    positions, seen = part.tokens(pool.key.shape[1])
    # In fp32: rounding probabilities to bf16 would part from vLLM's own CPU kernel.
    key, value = (
        cache.index_select(0, part.blocks).flatten(0, 1)[seen].transpose(0, 1).float()
        for cache in (pool.key, pool.value)
    )
    # Heads [num_kv_heads, group] of a row, by rows.
    folded = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).float()
    scores = folded.flatten(1, 2) @ key.transpose(1, 2)
    # The scales of fp8 blocks are 1 in others.
    scores = scores.unflatten(1, (-1, num_rows))
    scores = scores.mul_(layer.softmax_scale * layer.k_scale)
    if layer.soft_cap:
        scores = scores.div_(layer.soft_cap).tanh_().mul_(layer.soft_cap)
    rows = torch.arange(part.position, part.position + num_rows)
    distance = positions[None, :] - rows[:, None]
    if pool.slopes is not None:
        scores = scores.add_(pool.slopes * distance)
    hidden = distance > 0
    if layer.sliding_window:
        hidden |= distance <= -layer.sliding_window
    if hidden.any():
        scores = scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(_finite(lse)[..., None]).exp_()
    out = (weights.flatten(1, 2) @ value).unflatten(1, (-1, num_rows))
    if layer.v_scale != 1.0:
        out = out.mul_(layer.v_scale)
    out = out.permute(2, 0, 1, 3).reshape(num_rows, num_heads, -1)
    return out, lse.permute(2, 0, 1).reshape(num_rows, num_heads)


def _merged(
    earlier: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp over the tokens of both, each as `_attend_part` gives."""
    if earlier is None:
        return out, lse
    before, lse_before = earlier
    total = torch.logaddexp(lse_before, lse)
    shift = _finite(total)
    weights = ((part - shift).exp()[:, :, None] for part in (lse_before, lse))
    return before * next(weights) + out * next(weights), total


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Zero where a row sees nothing, so that its weights become 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
