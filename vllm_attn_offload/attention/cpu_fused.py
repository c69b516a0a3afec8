# SPDX-License-Identifier: Apache-2.0
"""Causal attention of a chunk by torch's fused kernel, with or without a window."""

from __future__ import annotations

import torch

from vllm_attn_offload.attention.cpu_chunk import CpuChunk

#: The only CPU attention of torch that returns the log-sum-exp. A row that its mask
#: hides from every key gets 0 there, so none may be.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
#: Rows of a tile with a window: each computes ``_TILE - 1`` scores in vain.
_TILE = 64


def attend_causal(chunk: CpuChunk, softmax_scale: float) -> None:
    """Fill output and log-sum-exp of every row, which sees all rows up to itself.

    Args:
        chunk: Key and value heads have one size.
        softmax_scale: Factor of ``q k^T``.
    """
    out, lse = _attend(
        chunk.query,
        _shared(chunk.key, chunk),
        _shared(chunk.value, chunk),
        is_causal=True,
        scale=softmax_scale,
    )
    chunk.output.copy_(out)
    chunk.lse.copy_(lse)


def attend_window(chunk: CpuChunk, softmax_scale: float, window: int) -> None:
    """Fill output and log-sum-exp of rows that see ``window`` rows, theirs included.

    Args:
        chunk: Key and value heads have one size.
        softmax_scale: Factor of ``q k^T``.
        window: At least 1 and less than the chunk's rows.
    """
    attend_causal(chunk.first(window), softmax_scale)
    row = torch.arange(_TILE).unsqueeze(1)
    ahead = torch.arange(_TILE + window - 1) - row
    mask = torch.zeros(ahead.shape).masked_fill_(
        (ahead < 0) | (ahead >= window), -torch.inf
    )
    num_tiles, num_left = divmod(chunk.num_rows - window, _TILE)
    if num_tiles:
        _attend_tiles(chunk, num_tiles, window, mask, softmax_scale)
    if num_left:
        begin = chunk.num_rows - num_left
        first_key = begin - window + 1
        out, lse = _attend(
            chunk.query[:, :, begin:],
            _shared(chunk.key[:, first_key:], chunk),
            _shared(chunk.value[:, first_key:], chunk),
            attn_mask=mask[:num_left, : num_left + window - 1],
            scale=softmax_scale,
        )
        chunk.output[:, :, begin:].copy_(out)
        chunk.lse[:, :, begin:].copy_(lse)


def _shared(part: torch.Tensor, chunk: CpuChunk) -> torch.Tensor:
    """Show a KV head's rows to each query head of its group."""
    return part.unsqueeze(1).expand(-1, chunk.query.shape[1], -1, -1)


def _attend_tiles(
    chunk: CpuChunk,
    num_tiles: int,
    window: int,
    mask: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Attend whole tiles from row ``window`` on; tiles are the batch.

    Their keys overlap, so no head's tiles can be one batch with those of another.
    """
    rows = slice(window, window + num_tiles * _TILE)
    seen = slice(1, rows.stop)
    split = (num_tiles, _TILE)
    for head in range(chunk.key.shape[0]):
        query, output = (
            part[head, :, rows].unflatten(1, split).transpose(0, 1)
            for part in (chunk.query, chunk.output)
        )
        key, value = (
            part[head, seen].unfold(0, mask.shape[1], _TILE).transpose(1, 2)
            for part in (chunk.key, chunk.value)
        )
        out, lse = _attend(
            query,
            _shared(key, chunk),
            _shared(value, chunk),
            attn_mask=mask,
            scale=softmax_scale,
        )
        output.copy_(out)
        chunk.lse[head, :, rows].unflatten(1, split).transpose(0, 1).copy_(lse)
