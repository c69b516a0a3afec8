# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Merge partial attention outputs by their log-sum-exp.

out = sum_p exp(lse_p - lse) out_p with lse = log sum_p exp(lse_p), all in float32.
Grid: one program per row of a split decode tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .decode_plan import DecodeAttentionPlan


@triton.jit
def merge_rows(
    out_ptr,  # [num_partials, BLOCK_D], one row per partial
    lse_ptr,  # [num_partials] fp32
    stride_out_partial,
    stride_lse_partial,
    num_partials,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merge the partials of one (token, head); returns (out [BLOCK_D], lse)."""
    offs_d = tl.arange(0, BLOCK_D)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        partial = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        lse = tl.load(
            lse_ptr + partial * stride_lse_partial,
            mask=partial < num_partials,
            other=float("-inf"),
        )
        lse = tl.where(lse == float("inf"), float("-inf"), lse)
        # An empty partial may hold anything, NaN too: it is not even read.
        used = lse > float("-inf")
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp(lse - shift)  # [BLOCK_P]
        decay = tl.exp(peak - shift)
        rows = tl.load(
            out_ptr + partial.to(tl.int64)[:, None] * stride_out_partial + offs_d,
            mask=used[:, None] & (offs_d < HEAD_SIZE)[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_P, BLOCK_D]
        acc = acc * decay + tl.sum(rows * weight[:, None], axis=0)
        total = total * decay + tl.sum(weight, axis=0)
        peak = new_peak
    is_empty = total == 0.0
    safe_total = tl.where(is_empty, 1.0, total)
    return acc / safe_total, tl.where(
        is_empty, float("-inf"), peak + tl.log(safe_total)
    )


@triton.jit
def _merge_parts_kernel(
    out_ptr,  # [num_tokens, num_query_heads, v_head_size]
    lse_ptr,  # [num_tokens, num_query_heads] fp32
    partial_out_ptr,  # [max_items, num_kv_heads, PART_ROWS, v_head_size] fp32
    partial_lse_ptr,  # [max_items, num_kv_heads, PART_ROWS] fp32
    counts_ptr,  # [2] int32: work items, split tiles
    merges_ptr,  # [MERGE_FIELDS, max_merges] int32
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_merges,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PART_ROWS: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # grid: (split tiles, rows of a tile, NUM_KV_HEADS)
    tile = tl.program_id(0)
    row = tl.program_id(1)
    kv_head = tl.program_id(2)
    if tile >= tl.load(counts_ptr + 1):
        return
    merges_ptr += tile
    q_start = tl.load(merges_ptr).to(tl.int64)
    q_len = tl.load(merges_ptr + stride_merges)
    query_row = tl.load(merges_ptr + 2 * stride_merges) + row
    first_partial = tl.load(merges_ptr + 3 * stride_merges).to(tl.int64)
    num_partials = tl.load(merges_ptr + 4 * stride_merges)
    token = query_row // GROUP_SIZE
    if token >= q_len:
        return
    head = kv_head * GROUP_SIZE + query_row % GROUP_SIZE
    state = (first_partial * NUM_KV_HEADS + kv_head) * PART_ROWS + row
    merged, lse = merge_rows(
        partial_out_ptr + state * V_HEAD_SIZE,
        partial_lse_ptr + state,
        NUM_KV_HEADS * PART_ROWS * V_HEAD_SIZE,
        NUM_KV_HEADS * PART_ROWS,
        num_partials,
        V_HEAD_SIZE,
        BLOCK_D,
        BLOCK_P,
    )
    offs_d = tl.arange(0, BLOCK_D)
    out_row = out_ptr + (q_start + token) * stride_out_token + head * stride_out_head
    tl.store(
        out_row + offs_d,
        merged.to(out_ptr.dtype.element_ty),
        mask=offs_d < V_HEAD_SIZE,
    )
    tl.store(lse_ptr + (q_start + token) * stride_lse_token + head, lse)


def merge_parts_arguments(
    plan: DecodeAttentionPlan, out: torch.Tensor, lse: torch.Tensor
) -> dict[str, Any]:
    """Every argument of the kernel by name; tensors as `merge_parts_launch`."""
    return {
        "out_ptr": out,
        "lse_ptr": lse,
        "partial_out_ptr": plan.partial_out,
        "partial_lse_ptr": plan.partial_lse,
        "counts_ptr": plan.counts,
        "merges_ptr": plan.merges,
        "stride_out_token": out.stride(0),
        "stride_out_head": out.stride(1),
        "stride_lse_token": lse.stride(0),
        "stride_merges": plan.merges.stride(0),
        "NUM_KV_HEADS": plan.num_kv_heads,
        "GROUP_SIZE": plan.group_size,
        "PART_ROWS": plan.part_rows,
        "V_HEAD_SIZE": plan.v_head_size,
        "BLOCK_D": triton.next_power_of_2(plan.v_head_size),
        "BLOCK_P": 16,
    }


def merge_parts_launch(
    plan: DecodeAttentionPlan, out: torch.Tensor, lse: torch.Tensor
) -> tuple[Any, tuple[int, ...], dict[str, Any]] | None:
    """Kernel, grid and arguments that merge the parts of ``plan``'s split tiles.

    Args:
        out: ``[num_tokens, num_query_heads, v_head_size]``, written.
        lse: ``[num_tokens, num_query_heads]`` float32, written.

    Returns:
        None where no tile is split.
    """
    num_merges = plan.max_merges if plan.fixed_grid else plan.num_merges
    if not num_merges:
        return None
    grid = (num_merges, plan.part_rows, plan.num_kv_heads)
    return _merge_parts_kernel, grid, merge_parts_arguments(plan, out, lse)
