# SPDX-License-Identifier: Apache-2.0
"""Attention of prefill chunks over their own tokens by torch.

`LocalPrefill` takes it where the compiled kernels are slower or lack something.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vllm_attn_offload.attention.cpu_chunk import CpuChunk, chunk_of
from vllm_attn_offload.attention.cpu_fused import attend_causal, attend_window
from vllm_attn_offload.attention.cpu_scores import attend_scores
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.client.step_partition import Prefill


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
        key: ``[num_tokens, num_kv_heads, head_size]``, in units of its scale.
        value: ``[num_tokens, num_kv_heads, head_size]``, likewise.
        output: ``[num_tokens, num_heads, head_size]``; rows of prefills are filled,
            the others set to zero where there are any.
        prefills: Which rows belong together.
        attention: Attributes of the layer; sinks do not enter here.

    Returns:
        ``[num_tokens, num_heads]`` fp32 natural log-sum-exp; -inf in other rows.
    """
    lse = torch.full(query.shape[:2], -torch.inf)
    filled = 0
    for prefill in prefills:
        output[filled : prefill.begin].zero_()
        rows = slice(prefill.begin, prefill.end)
        chunk = chunk_of(query[rows], key[rows], value[rows], output[rows], lse[rows])
        _attend(chunk, attention)
        if attention.v_scale != 1.0:
            output[rows].mul_(attention.v_scale)
        filled = prefill.end
    output[filled:].zero_()
    return lse


def _attend(chunk: CpuChunk, attention: LayerAttention) -> None:
    """Attend one request by the fastest exact way."""
    window = attention.sliding_window
    if attention.soft_cap or attention.alibi_slopes is not None:
        attend_scores(chunk, attention)
    elif 0 < window < chunk.num_rows:
        attend_window(chunk, attention.score_scale, window)
    else:
        attend_causal(chunk, attention.score_scale)
