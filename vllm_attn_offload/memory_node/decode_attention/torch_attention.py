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
from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.layer import DTYPE_BYTES
from vllm_attn_offload.protocol.step import StepMetadata

#: Tokens, and query rows x heads x tokens, that are attended at once, in a few ms. More
#: rows than that have the tokens gathered again, for a quarter of the time.
_MAX_TOKENS = 2048
_MAX_SCORES = 1 << 19

_TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class _Pool:
    """K is [num_slots, num_kv_heads, head_size], V likewise with v_head_size."""

    layer: LayerGeometry
    dtype: torch.dtype
    block_size: int
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Request:
    """Query rows of a request, and its int64 blocks ``[num_blocks]``."""

    begin: int
    end: int
    blocks: torch.Tensor
    seq_len: int


@dataclass(frozen=True, slots=True)
class _Part:
    """Query rows of a request, and tokens that they attend to at once.

    ``blocks`` is int64 ``[num_blocks]``. With ``is_last`` no token is left.
    """

    begin: int
    end: int
    blocks: torch.Tensor
    num_tokens: int
    is_last: bool


@dataclass(slots=True)
class _KernelPlan:
    """One step: int64 rows and slots ``[num_stored]`` of new tokens; its requests.

    ``next_part`` and then ``parts`` are left of an unfinished layer, and made when they
    are needed: a request may have very many. ``partial`` is the output of a request's
    earlier parts, fp32, and its log-sum-exp.
    """

    stored_rows: torch.Tensor
    stored_slots: torch.Tensor
    requests: tuple[_Request, ...]
    parts: Iterator[_Part] | None = None
    next_part: _Part | None = None
    partial: tuple[torch.Tensor, torch.Tensor] | None = None


class TorchDecodeAttention(DecodeAttention[_Pool, _KernelPlan]):
    """The kernel that needs nothing but torch."""

    name = "torch"

    def block_bytes(self, layer: LayerGeometry, block_size: int, dtype: str) -> int:
        row = layer.num_kv_heads * (layer.head_size + layer.v_head_size)
        return block_size * row * DTYPE_BYTES[dtype]

    def bind(
        self, geometry: SessionGeometry, layer: LayerGeometry, region: mmap.mmap
    ) -> _Pool:
        dtype = _TORCH_DTYPES[geometry.dtype]
        elements = torch.frombuffer(region, dtype=dtype)
        row_k = layer.num_kv_heads * layer.head_size
        row_v = layer.num_kv_heads * layer.v_head_size
        num_slots = elements.numel() // (row_k + row_v)
        key, value = elements[: num_slots * (row_k + row_v)].split(
            [num_slots * row_k, num_slots * row_v]
        )
        return _Pool(
            layer=layer,
            dtype=dtype,
            block_size=geometry.groups[layer.group].block_size,
            key=key.view(num_slots, layer.num_kv_heads, layer.head_size),
            value=value.view(num_slots, layer.num_kv_heads, layer.v_head_size),
        )

    def plan(
        self,
        group: int,
        geometry: SessionGeometry,
        step: StepMetadata,
        previous: _KernelPlan | None,
    ) -> _KernelPlan:
        block_size = geometry.groups[group].block_size
        slots = torch.from_numpy(step.slot_mapping.copy())
        stored = (slots >= 0).nonzero().flatten()
        return _KernelPlan(
            stored_rows=stored,
            stored_slots=slots[stored],
            requests=tuple(
                _plan_request(step, index, block_size) for index in range(step.num_reqs)
            ),
        )

    def store(
        self, pool: _Pool, plan: _KernelPlan, call: LayerCall, first: int, last: int
    ) -> None:
        _, key, value = payload_views(call.payload, call.layout, pool.layer, pool.dtype)
        begin, end = torch.searchsorted(plan.stored_rows, torch.tensor([first, last]))
        rows, slots = plan.stored_rows[begin:end], plan.stored_slots[begin:end]
        pool.key[slots] = key[rows]
        pool.value[slots] = value[rows]

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
        parts = plan.parts or _parts_of(
            plan.requests, pool.block_size, pool.layer.num_query_heads
        )
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


def _plan_request(step: StepMetadata, index: int, block_size: int) -> _Request:
    begin, end = (int(x) for x in step.query_start_loc[index : index + 2])
    seq_len = int(step.seq_lens[index]) if begin < end else 0
    num_blocks = -(-seq_len // block_size)
    blocks = torch.from_numpy(step.block_table[index, :num_blocks].copy()).long()
    return _Request(begin, end, blocks, seq_len)


def _parts_of(
    requests: tuple[_Request, ...], block_size: int, num_heads: int
) -> Iterator[_Part]:
    """Cut requests between rows, and rows of long ones between blocks."""
    most_blocks = max(1, _MAX_TOKENS // block_size)
    for request in requests:
        most_tokens = max(1, min(request.seq_len, most_blocks * block_size))
        num_rows = max(1, _MAX_SCORES // (most_tokens * num_heads))
        for first in range(request.begin, request.end, num_rows):
            last = min(request.end, first + num_rows)
            for block in range(0, max(1, len(request.blocks)), most_blocks):
                left = request.seq_len - block * block_size
                num_tokens = min(left, most_tokens)
                blocks = request.blocks[block : block + most_blocks]
                yield _Part(first, last, blocks, num_tokens, num_tokens == left)


def _attend_part(
    pool: _Pool, part: _Part, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend for rows of one request; the query heads of a KV head become rows.

    Returns:
        fp32 ``[num_rows, num_heads, v_head_size]`` and ``[num_rows, num_heads]``.
    """
    num_rows, num_heads, head_size = query.shape
    if not part.num_tokens:
        out = torch.zeros(num_rows, num_heads, pool.layer.v_head_size)
        return out, torch.full((num_rows, num_heads), -torch.inf)
    num_kv_heads = pool.layer.num_kv_heads
    group = num_heads // num_kv_heads
    # In fp32: rounding probabilities to bf16 would part from vLLM's own CPU kernel.
    # Not kept in the plan: they take 8 bytes a token.
    offsets = torch.arange(pool.block_size)
    slots = (part.blocks[:, None] * pool.block_size + offsets).flatten()
    slots = slots[: part.num_tokens]
    key = pool.key[slots].transpose(0, 1).float()
    value = pool.value[slots].transpose(0, 1).float()
    folded = (
        query.unflatten(1, (num_kv_heads, group))
        .permute(1, 2, 0, 3)
        .reshape(num_kv_heads, group * num_rows, head_size)
        .float()
    )
    # The only CPU attention of torch that returns the log-sum-exp.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        folded[None],
        key[None],
        value[None],
        scale=pool.layer.softmax_scale,
    )
    if key.shape[1] < 64:
        # Fewer keys than a vector, all NaN, look to torch like no key.
        poisoned = (folded @ key.transpose(1, 2)).isnan().any(2)
        out[0, poisoned] = lse[0, poisoned] = torch.nan
    out = out[0].view(num_kv_heads, group, num_rows, -1).permute(2, 0, 1, 3)
    lse = lse[0].view(num_kv_heads, group, num_rows).permute(2, 0, 1)
    return out.reshape(num_rows, num_heads, -1), lse.reshape(num_rows, num_heads)


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
    weights = ((part - total).exp()[:, :, None] for part in (lse_before, lse))
    return before * next(weights) + out * next(weights), total
