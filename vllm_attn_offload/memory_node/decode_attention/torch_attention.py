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

#: Query rows x tokens that are attended at once: turns stay short, and gathering the
#: tokens again for every part costs little.
_MAX_SCORES = 1 << 22

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
    """Query rows of a request that are attended at once, and its int64 blocks."""

    begin: int
    end: int
    blocks: torch.Tensor
    seq_len: int


@dataclass(slots=True)
class _KernelPlan:
    """One step: int64 rows and slots ``[num_stored]`` of new tokens; its requests.

    ``num_done`` requests of an unfinished layer are attended.
    """

    stored_rows: torch.Tensor
    stored_slots: torch.Tensor
    requests: tuple[_Request, ...]
    num_done: int = 0


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
                part
                for index in range(step.num_reqs)
                for part in _plan_request(step, index, block_size)
            ),
        )

    def store(self, pool: _Pool, plan: _KernelPlan, call: LayerCall) -> None:
        _, key, value = payload_views(call.payload, call.layout, pool.layer, pool.dtype)
        pool.key[plan.stored_slots] = key[plan.stored_rows]
        pool.value[plan.stored_slots] = value[plan.stored_rows]

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
        for request in plan.requests[plan.num_done :]:
            rows = slice(request.begin, request.end)
            outs[rows], lse = _attend_request(pool, request, query[rows])
            if lses is not None:
                lses[rows] = lse
            plan.num_done += 1
            if time.perf_counter() > until and plan.num_done < len(plan.requests):
                return False
        plan.num_done = 0
        return True


def _plan_request(
    step: StepMetadata, index: int, block_size: int
) -> Iterator[_Request]:
    begin, end = (int(x) for x in step.query_start_loc[index : index + 2])
    if begin == end:
        return
    seq_len = int(step.seq_lens[index])
    num_blocks = -(-seq_len // block_size)
    blocks = torch.from_numpy(step.block_table[index, :num_blocks].copy()).long()
    num_rows = max(1, _MAX_SCORES // max(1, seq_len))
    for first in range(begin, end, num_rows):
        yield _Request(first, min(end, first + num_rows), blocks, seq_len)


def _attend_request(
    pool: _Pool, request: _Request, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend for one request; the query heads of a KV head are folded into rows."""
    num_rows, num_heads, head_size = query.shape
    if not request.seq_len:
        out = query.new_zeros(num_rows, num_heads, pool.layer.v_head_size)
        return out, torch.full((num_rows, num_heads), -torch.inf)
    num_kv_heads = pool.layer.num_kv_heads
    group = num_heads // num_kv_heads
    # In fp32: rounding probabilities to bf16 would part from vLLM's own CPU kernel.
    # Not kept in the plan: they take 8 bytes a token.
    offsets = torch.arange(pool.block_size)
    slots = (request.blocks[:, None] * pool.block_size + offsets).flatten()
    slots = slots[: request.seq_len]
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
    return (
        out.reshape(num_rows, num_heads, -1).to(pool.dtype),
        lse.reshape(num_rows, num_heads),
    )
