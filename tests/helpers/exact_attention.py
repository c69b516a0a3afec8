# SPDX-License-Identifier: Apache-2.0
"""Attention as a layer's geometry describes it, in plain torch of any dtype."""

from __future__ import annotations

import torch

from vllm_attn_offload.protocol.geometry import LayerGeometry


def exact_attention(
    layer: LayerGeometry,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend for rows of one request, with the layer's window, cap and slopes.

    Args:
        layer: Heads, scale, window, soft cap and ALiBi slopes.
        query: ``[rows, num_query_heads, head_size]``.
        key: ``[tokens, num_kv_heads, head_size]``.
        value: ``[tokens, num_kv_heads, v_head_size]``.
        query_positions: ``[rows]`` integers: position of each row in the request.
        key_positions: ``[tokens]`` integers; None: the first tokens, in order.
        dtype: Of all operations.

    Returns:
        ``[rows, num_query_heads, v_head_size]``, and the log-sum-exp ``[rows,
        num_query_heads]``: 0 and -inf where a row sees no token.
    """
    if key_positions is None:
        key_positions = torch.arange(key.shape[0])
    group = layer.num_query_heads // layer.num_kv_heads
    key, value = (x.to(dtype).repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.to(dtype), key) * layer.softmax_scale
    if layer.soft_cap:
        scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
    distance = key_positions[None, :] - query_positions[:, None]
    if layer.alibi_slopes:
        slopes = torch.tensor(layer.alibi_slopes, dtype=dtype)
        scores = scores + slopes[:, None, None] * distance
    hidden = distance > 0
    if layer.sliding_window:
        hidden |= distance <= -layer.sliding_window
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return torch.einsum("hqk,khd->qhd", weights, value), lse.T
