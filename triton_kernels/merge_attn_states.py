# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Merge partial attention outputs by their log-sum-exp.

out = sum_p exp(lse_p - lse) out_p with lse = log sum_p exp(lse_p), all in float32.
Grid: one program per (token, head), or per row of a split decode tile.
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
def _merge_attn_states_kernel(
    out_ptr,  # [num_tokens, num_heads, head_size]
    lse_ptr,  # [num_tokens, num_heads] fp32
    outs_ptr,  # [num_partials, num_tokens, num_heads, head_size]
    lses_ptr,  # [num_partials, num_tokens, num_heads] fp32
    num_partials,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_outs_partial,
    stride_outs_token,
    stride_outs_head,
    stride_lses_partial,
    stride_lses_token,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # grid: (num_tokens, num_heads)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row, lse = merge_rows(
        outs_ptr + token * stride_outs_token + head * stride_outs_head,
        lses_ptr + token * stride_lses_token + head,
        stride_outs_partial,
        stride_lses_partial,
        num_partials,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_P,
    )
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + token * stride_out_token + head * stride_out_head + offs_d,
        row.to(out_ptr.dtype.element_ty),
        mask=offs_d < HEAD_SIZE,
    )
    tl.store(lse_ptr + token * stride_lse_token + head, lse)


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
    """Every argument of the kernel by name."""
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


def launch_merge_parts(
    plan: DecodeAttentionPlan, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge the parts of every split tile of ``plan`` into ``out`` and ``lse``."""
    num_merges = plan.max_merges if plan.fixed_grid else plan.num_merges
    if num_merges:
        grid = (num_merges, plan.part_rows, plan.num_kv_heads)
        _merge_parts_kernel[grid](**merge_parts_arguments(plan, out, lse))


def merge_attn_states(
    outs: torch.Tensor,
    lses: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge any number of partial attention states.

    A partial whose lse is -inf (or +inf, which some kernels write for no keys) counts
    nothing, whatever its output holds. No partial left: out = 0, lse = -inf.

    Args:
        outs: ``[num_partials, num_tokens, num_heads, head_size]``.
        lses: ``[num_partials, num_tokens, num_heads]`` float32, natural logarithm.
        out: ``[num_tokens, num_heads, head_size]``; allocated if None.
        lse: ``[num_tokens, num_heads]`` float32; allocated if None.

    Returns:
        (out, lse).

    Raises:
        ValueError: shapes disagree, or the last dimension is not contiguous.
    """
    if outs.dim() != 4 or lses.shape != outs.shape[:3] or lses.dtype != torch.float32:
        raise ValueError(
            f"outs {tuple(outs.shape)}, lses {tuple(lses.shape)} {lses.dtype}. Pass "
            "[partials, tokens, heads, head_size] and a float32 lse without the last."
        )
    _, num_tokens, num_heads, head_size = outs.shape
    if out is None:
        out = outs.new_empty((num_tokens, num_heads, head_size))
    if lse is None:
        lse = lses.new_empty((num_tokens, num_heads))
    if out.shape != outs.shape[1:] or lse.shape != lses.shape[1:]:
        raise ValueError(
            f"out {tuple(out.shape)}, lse {tuple(lse.shape)}; expected "
            f"{tuple(outs.shape[1:])} and {tuple(lses.shape[1:])}. Pass buffers of "
            "that shape or None."
        )
    if any(tensor.stride(-1) != 1 for tensor in (outs, lses, out, lse)):
        raise ValueError(
            "A tensor is strided in its last dimension; it must be contiguous there. "
            "Call .contiguous() on it."
        )
    if num_tokens:
        arguments = merge_states_arguments(outs, lses, out, lse)
        _merge_attn_states_kernel[(num_tokens, num_heads)](**arguments)
    return out, lse


def merge_states_arguments(
    outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> dict[str, Any]:
    """Every argument of the kernel by name."""
    num_partials, _, _, head_size = outs.shape
    return {
        "out_ptr": out,
        "lse_ptr": lse,
        "outs_ptr": outs,
        "lses_ptr": lses,
        "num_partials": num_partials,
        "stride_out_token": out.stride(0),
        "stride_out_head": out.stride(1),
        "stride_lse_token": lse.stride(0),
        "stride_outs_partial": outs.stride(0),
        "stride_outs_token": outs.stride(1),
        "stride_outs_head": outs.stride(2),
        "stride_lses_partial": lses.stride(0),
        "stride_lses_token": lses.stride(1),
        "HEAD_SIZE": head_size,
        "BLOCK_D": triton.next_power_of_2(head_size),
        "BLOCK_P": min(16, triton.next_power_of_2(max(1, num_partials))),
    }
