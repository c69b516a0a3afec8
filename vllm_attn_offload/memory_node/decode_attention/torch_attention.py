# SPDX-License-Identifier: Apache-2.0
"""Decode attention in plain torch: gathers each request's blocks, then attends.

Works on every CPU without a compiler; the compiled kernel replaces it where it exists.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch

from vllm_attn_offload.memory_node.decode_attention.base import (
    DTYPE_BYTES,
    DecodeAttention,
    RowLayout,
)
from vllm_attn_offload.memory_node.step import AttentionStep
from vllm_attn_offload.protocol import LayerGeometry, SessionGeometry

_TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class _Pool:
    """K is [num_slots, num_kv_heads, head_size], V likewise with v_head_size."""

    layer: LayerGeometry
    rows: RowLayout
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
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Plan:
    num_tokens: int
    stored_rows: torch.Tensor
    stored_slots: torch.Tensor
    requests: tuple[_Request, ...]


class TorchDecodeAttention(DecodeAttention):
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
            rows=RowLayout.of(layer),
            dtype=dtype,
            block_size=geometry.groups[layer.group].block_size,
            key=key.view(num_slots, layer.num_kv_heads, layer.head_size),
            value=value.view(num_slots, layer.num_kv_heads, layer.v_head_size),
        )

    def plan(self, group: int, geometry: SessionGeometry, step: AttentionStep) -> _Plan:
        block_size = geometry.groups[group].block_size
        # Layers of a group share a mask, so they share the heads per KV head, too.
        layer = next(item for item in geometry.layers if item.group == group)
        heads_per_kv_head = layer.num_query_heads // layer.num_kv_heads
        slots = torch.from_numpy(step.slot_mapping.copy())
        stored = (slots >= 0).nonzero().flatten()
        return _Plan(
            num_tokens=step.num_tokens,
            stored_rows=stored,
            stored_slots=slots[stored],
            requests=tuple(
                _plan_request(step, index, block_size, heads_per_kv_head)
                for index in range(step.num_reqs)
                if step.query_start_loc[index] < step.query_start_loc[index + 1]
            ),
        )

    def store(self, pool: object, plan: object, qkv: memoryview) -> None:
        assert isinstance(pool, _Pool)
        assert isinstance(plan, _Plan)
        rows = _rows(pool, plan, qkv)[plan.stored_rows]
        _, key, value = rows.split([pool.rows.q, pool.rows.k, pool.rows.v], dim=1)
        pool.key[plan.stored_slots] = key.view(-1, *pool.key.shape[1:])
        pool.value[plan.stored_slots] = value.view(-1, *pool.value.shape[1:])

    def attend(
        self,
        pool: object,
        plan: object,
        qkv: memoryview,
        out: memoryview,
        lse: memoryview | None,
    ) -> None:
        assert isinstance(pool, _Pool)
        assert isinstance(plan, _Plan)
        heads = pool.layer.num_query_heads
        query = _rows(pool, plan, qkv)[:, : pool.rows.q].view(
            plan.num_tokens, heads, pool.layer.head_size
        )
        outs = torch.frombuffer(out, dtype=pool.dtype).view(
            plan.num_tokens, heads, pool.layer.v_head_size
        )
        lses = torch.empty(plan.num_tokens, heads, dtype=torch.float32)
        for request in plan.requests:
            rows = slice(request.begin, request.end)
            outs[rows], lses[rows] = _attend_request(pool, request, query[rows])
        if lse is not None:
            torch.frombuffer(lse, dtype=torch.float32).copy_(lses.flatten())


def _rows(pool: _Pool, plan: _Plan, qkv: memoryview) -> torch.Tensor:
    return torch.frombuffer(qkv, dtype=pool.dtype).view(plan.num_tokens, -1)


def _plan_request(
    step: AttentionStep, index: int, block_size: int, group: int
) -> _Request:
    begin, end = (int(x) for x in step.query_start_loc[index : index + 2])
    seq_len = int(step.seq_lens[index])
    blocks = torch.from_numpy(step.block_table[index].copy()).long()
    offsets = torch.arange(block_size)
    slots = (blocks[:, None] * block_size + offsets).flatten()[:seq_len]
    return _Request(begin, end, slots, _causal_mask(end - begin, seq_len, group))


def _causal_mask(num_rows: int, seq_len: int, group: int) -> torch.Tensor | None:
    """Additive mask for the last ``num_rows`` tokens, once per query head of a group.

    torch's own causal flag aligns at the first token and not at the last.
    """
    if num_rows == 1:
        return None
    hidden = torch.ones(num_rows, seq_len, dtype=torch.bool).triu(
        seq_len - num_rows + 1
    )
    mask = torch.zeros(num_rows, seq_len).masked_fill_(hidden, float("-inf"))
    return mask.repeat(group, 1)


def _attend_request(
    pool: _Pool, request: _Request, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend for one request; the query heads of a KV head are folded into rows."""
    num_rows, num_heads, head_size = query.shape
    num_kv_heads = pool.layer.num_kv_heads
    group = num_heads // num_kv_heads
    # In fp32: rounding probabilities to bf16 would part from vLLM's own CPU kernel.
    key = pool.key[request.slots].transpose(0, 1).float()
    value = pool.value[request.slots].transpose(0, 1).float()
    folded = (
        query.view(num_rows, num_kv_heads, group, head_size)
        .permute(1, 2, 0, 3)
        .reshape(num_kv_heads, group * num_rows, head_size)
        .float()
    )
    # The only CPU attention of torch that returns the log-sum-exp.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        folded[None],
        key[None],
        value[None],
        attn_mask=request.mask,
        scale=pool.layer.softmax_scale,
    )
    out = out[0].view(num_kv_heads, group, num_rows, -1).permute(2, 0, 1, 3)
    lse = lse[0].view(num_kv_heads, group, num_rows).permute(2, 0, 1)
    return (
        out.reshape(num_rows, num_heads, -1).to(pool.dtype),
        lse.reshape(num_rows, num_heads),
    )
