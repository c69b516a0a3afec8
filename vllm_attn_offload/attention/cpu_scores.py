# SPDX-License-Identifier: Apache-2.0
"""Causal attention of a chunk with capped or biased scores, which are held in tiles."""

from __future__ import annotations

import torch

from vllm_attn_offload.attention.cpu_chunk import CpuChunk
from vllm_attn_offload.attention.layer_attention import LayerAttention

#: Scores of one tile, in fp32.
_SCORES_BYTES = 32 << 20
_FLOAT_BYTES = 4


def attend_scores(chunk: CpuChunk, attention: LayerAttention) -> None:
    """Fill output and log-sum-exp of every row, computed in fp32.

    Args:
        chunk: Key and value heads may differ in size.
        attention: Attributes of the layer; sinks do not enter here.
    """
    num_rows, window = chunk.num_rows, attention.sliding_window or chunk.num_rows
    num_heads = chunk.query.shape[0] * chunk.query.shape[1]
    num_seen = min(window, num_rows)
    # A tile of n rows sees fewer than ``num_seen + n`` keys, n at most ``num_seen``.
    row_bytes = num_heads * 2 * num_seen * _FLOAT_BYTES
    tile = max(1, min(num_seen, _SCORES_BYTES // row_bytes))
    for begin in range(0, num_rows, tile):
        end = min(begin + tile, num_rows)
        first_key = max(0, begin - window + 1)
        scores = _scores(chunk, begin, end, first_key, attention)
        _weigh(chunk, scores, begin, end, first_key)


def _scores(
    chunk: CpuChunk, begin: int, end: int, first_key: int, attention: LayerAttention
) -> torch.Tensor:
    """Scores ``[num_kv_heads, group, rows, keys]`` of a tile, -inf where unseen."""
    query = chunk.query[:, :, begin:end].float()
    key = chunk.key[:, first_key:end].float()
    scores = query.flatten(1, 2) @ key.transpose(1, 2)
    scores = scores.unflatten(1, query.shape[1:3]).mul_(attention.score_scale)
    if cap := attention.soft_cap:
        scores.div_(cap).tanh_().mul_(cap)
    ahead = torch.arange(first_key, end) - torch.arange(begin, end).unsqueeze(1)
    if attention.alibi_slopes is not None:
        slopes = attention.alibi_slopes.view(*scores.shape[:2], 1, 1)
        scores.addcmul_(slopes, ahead.float())
    unseen = ahead > 0
    if window := attention.sliding_window:
        unseen |= ahead <= -window
    return scores.masked_fill_(unseen, -torch.inf)


def _weigh(
    chunk: CpuChunk, scores: torch.Tensor, begin: int, end: int, first_key: int
) -> None:
    """Fill a tile's output and log-sum-exp; the scores are overwritten."""
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    out = weights.flatten(1, 2) @ chunk.value[:, first_key:end].float()
    chunk.output[:, :, begin:end].copy_(out.unflatten(1, weights.shape[1:3]) / total)
    chunk.lse[:, :, begin:end].copy_((highest + total.log()).squeeze(-1))
