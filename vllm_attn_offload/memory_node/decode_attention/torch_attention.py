# SPDX-License-Identifier: Apache-2.0
"""Decode attention in plain torch: gathers each request's blocks, then attends.

Works on every CPU without a compiler; the compiled kernel replaces it where it exists.
"""

from __future__ import annotations

import mmap
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
    """One request of a step: its query rows and the slots of its tokens."""

    begin: int
    end: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class _KernelPlan:
    """One step: int64 rows and slots ``[num_stored]`` of new tokens; its requests."""

    stored_rows: torch.Tensor
    stored_slots: torch.Tensor
    requests: tuple[_Request, ...]


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
                _plan_request(step, index, block_size)
                for index in range(step.num_reqs)
                if step.query_start_loc[index] < step.query_start_loc[index + 1]
            ),
        )

    def store(self, pool: _Pool, plan: _KernelPlan, call: LayerCall) -> None:
        _, key, value = payload_views(call.payload, call.layout, pool.layer, pool.dtype)
        pool.key[plan.stored_slots] = key[plan.stored_rows]
        pool.value[plan.stored_slots] = value[plan.stored_rows]

    def attend(self, pool: _Pool, plan: _KernelPlan, call: LayerCall) -> None:
        query, _, _ = payload_views(call.payload, call.layout, pool.layer, pool.dtype)
        outs = torch.frombuffer(call.out, dtype=pool.dtype).view(
            *query.shape[:2], pool.layer.v_head_size
        )
        lses = torch.empty(query.shape[:2], dtype=torch.float32)
        for request in plan.requests:
            rows = slice(request.begin, request.end)
            outs[rows], lses[rows] = _attend_request(pool, request, query[rows])
        if call.lse is not None:
            torch.frombuffer(call.lse, dtype=torch.float32).copy_(lses.flatten())


def _plan_request(step: StepMetadata, index: int, block_size: int) -> _Request:
    begin, end = (int(x) for x in step.query_start_loc[index : index + 2])
    seq_len = int(step.seq_lens[index])
    blocks = torch.from_numpy(step.block_table[index].copy()).long()
    offsets = torch.arange(block_size)
    slots = (blocks[:, None] * block_size + offsets).flatten()[:seq_len]
    return _Request(begin, end, slots)


def _attend_request(
    pool: _Pool, request: _Request, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend for one request; the query heads of a KV head are folded into rows."""
    num_rows, num_heads, head_size = query.shape
    if not request.slots.numel():
        out = query.new_zeros(num_rows, num_heads, pool.layer.v_head_size)
        return out, torch.full((num_rows, num_heads), -torch.inf)
    num_kv_heads = pool.layer.num_kv_heads
    group = num_heads // num_kv_heads
    # In fp32: rounding probabilities to bf16 would part from vLLM's own CPU kernel.
    key = pool.key[request.slots].transpose(0, 1).float()
    value = pool.value[request.slots].transpose(0, 1).float()
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
    out = out[0].view(num_kv_heads, group, num_rows, -1).permute(2, 0, 1, 3)
    lse = lse[0].view(num_kv_heads, group, num_rows).permute(2, 0, 1)
    return (
        out.reshape(num_rows, num_heads, -1).to(pool.dtype),
        lse.reshape(num_rows, num_heads),
    )
