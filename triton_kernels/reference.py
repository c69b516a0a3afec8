# SPDX-License-Identifier: Apache-2.0
"""Obvious torch versions of every kernel; tests and benchmarks compare against them."""

from __future__ import annotations

import torch

FP8_MAX = 448.0


def naive_paged_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    softmax_scale: float,
    num_blocks: torch.Tensor | None = None,
    block_positions: torch.Tensor | None = None,
    block_lens: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    first_block: torch.Tensor | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend request by request; arguments as in ``paged_decode_attention``.

    Args:
        num_blocks: ``[num_seqs]``, blocks of each request in the table; default
            ``ceil(seq_len / block_size)``.
        compute_dtype: dtype of every operation, to learn what an operator that
            rounds everywhere would get wrong.

    Returns:
        out ``[num_tokens, num_query_heads, v_head_size]`` and lse
        ``[num_tokens, num_query_heads]`` (natural logarithm), both in
        ``compute_dtype``.
    """
    block_size = key_cache.shape[2]
    num_heads = query.shape[1]
    out = query.new_zeros(
        (query.shape[0], num_heads, value_cache.shape[3]), dtype=compute_dtype
    )
    lse = query.new_full(
        (query.shape[0], num_heads), float("-inf"), dtype=compute_dtype
    )
    for seq in range(seq_lens.shape[0]):
        start, end = int(query_start_loc[seq]), int(query_start_loc[seq + 1])
        seq_len = int(seq_lens[seq])
        skipped = 0 if first_block is None else int(first_block[seq])
        columns = max(0, -(-seq_len // block_size) - skipped)
        if num_blocks is not None:
            columns = int(num_blocks[seq])
        keys, values, positions = [], [], []
        for column in range(columns):
            first = (skipped + column) * block_size
            if block_positions is not None:
                first = int(block_positions[seq, column])
            length = min(max(seq_len - first, 0), block_size)
            if block_lens is not None:
                length = min(length, int(block_lens[seq, column]))
            block = int(block_table[seq, column])
            keys.append(key_cache[block, :, :length])
            values.append(value_cache[block, :, :length])
            positions.append(torch.arange(first, first + length, device=query.device))
        if end == start:
            continue
        position = seq_len - (end - start)
        if query_positions is not None:
            position = int(query_positions[seq])
        out[start:end], lse[start:end] = _attend(
            query[start:end],
            _dequantise(keys, key_cache, k_scale, compute_dtype),
            _dequantise(values, value_cache, v_scale, compute_dtype),
            torch.cat([torch.arange(0, device=query.device), *positions]),
            position,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
    return out, lse


def _dequantise(
    parts: list[torch.Tensor],
    cache: torch.Tensor,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Join slices of blocks to ``[num_kv_heads, num_tokens, head_size]``."""
    if not parts:
        return cache.new_zeros((cache.shape[1], 0, cache.shape[3]), dtype=dtype)
    joined = torch.cat([part.to(dtype) for part in parts], dim=1)
    if scale is not None:
        joined = joined * scale.to(dtype).reshape(-1, 1, 1)
    return joined


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    query_position: int,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request: query ``[rows, heads, D]``, keys and values ``[kv heads, n, D]``."""
    num_rows, num_heads, _ = query.shape
    dtype = keys.dtype
    group = num_heads // keys.shape[0]
    keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
    scores = query.to(dtype).transpose(0, 1) @ keys.transpose(1, 2) * softmax_scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    rows = query_position + torch.arange(num_rows, device=query.device)
    distance = positions[None, :] - rows[:, None]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(dtype)[:, None, None] * distance
    hidden = distance > 0
    if sliding_window is not None:
        hidden = hidden | (distance <= -sliding_window)
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.new_full((num_heads, num_rows), float("-inf"))
    if scores.shape[-1]:
        lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype)[:, None])
    weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    return (weights @ values).transpose(0, 1), lse.transpose(0, 1)


def naive_merge_attn_states(
    outs: torch.Tensor, lses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge ``outs [P, T, H, D]`` by ``lses [P, T, H]``; empty partials count nothing.

    Returns:
        out ``[T, H, D]`` and lse ``[T, H]``, both float32.
    """
    lses = lses.float()
    lses = lses.masked_fill(lses == float("inf"), float("-inf"))
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.nan_to_num(neginf=0.0))
    used = outs.float().masked_fill((lses == float("-inf"))[..., None], 0.0)
    return (used * weights[..., None]).sum(dim=0), lse


def naive_store_kv(
    new: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> None:
    """Write rows ``new [T, heads, D]`` into ``cache [blocks, heads, slots, D]``."""
    block_size = cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        row = new[token].float()
        if scale is not None:
            row = row / scale.float().reshape(-1, 1)
        if cache.dtype == torch.float8_e4m3fn:
            row = row.clamp(-FP8_MAX, FP8_MAX)
        cache[slot // block_size, :, slot % block_size] = row.to(cache.dtype)
