# SPDX-License-Identifier: Apache-2.0
"""Attention of prefill chunks over their own tokens, on the compute node's CPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.client.step_partition import Prefill

#: CPUs without bf16 instructions multiply in fp32 several times faster.
_COMPUTES_BF16 = (
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)


def attend_locally(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    prefills: Iterable[Prefill],
    attention: LayerAttention,
) -> torch.Tensor:
    """Causal attention of every prefill over its own rows.

    Args:
        query: ``[num_tokens, num_heads, head_size]``.
        key: ``[num_tokens, num_kv_heads, head_size]``.
        value: ``[num_tokens, num_kv_heads, head_size]``.
        output: ``[num_tokens, num_heads, head_size]``; rows of prefills are filled,
            the others set to zero where there are any.
        prefills: Which rows belong together.
        attention: Attributes of the layer.

    Returns:
        ``[num_tokens, num_heads]`` fp32 natural log-sum-exp; -inf in other rows.
    """
    lse = torch.full(query.shape[:2], -torch.inf)
    filled = 0
    for prefill in prefills:
        output[filled : prefill.begin].zero_()
        rows = slice(prefill.begin, prefill.end)
        _attend(
            query[rows],
            key[rows],
            value[rows],
            output[rows],
            lse[rows],
            attention.softmax_scale,
        )
        filled = prefill.end
    output[filled:].zero_()
    return lse


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Attend one request; KV heads are the batch, query heads of one share its keys."""
    num_kv_heads = key.shape[1]
    group = query.shape[1] // num_kv_heads
    if query.dtype != torch.float32 and not _COMPUTES_BF16:
        query, key, value = query.float(), key.float(), value.float()
    # [num_kv_heads, group, rows, size]; the group's keys are one tensor, seen often.
    queries = query.unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
    keys, values = (
        part.permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)
        for part in (key, value)
    )
    # The only CPU attention of torch that returns the log-sum-exp.
    out, out_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, is_causal=True, scale=softmax_scale
    )
    output.unflatten(1, (num_kv_heads, group)).copy_(out.permute(2, 0, 1, 3))
    lse.unflatten(1, (num_kv_heads, group)).copy_(out_lse.permute(2, 0, 1))
