# SPDX-License-Identifier: Apache-2.0
"""Checks and kernel arguments of ``paged_decode_attention``.

The compile gate builds its variants from the same arguments as a launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .decode_plan import DecodeAttentionPlan
from .tiles import split_head_size

_TL_DTYPE = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def is_interpreted() -> bool:
    """True if kernels defined now run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def check_tensors(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DecodeAttentionPlan,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Refuse tensors of other shapes, dtypes or strides than the plan's.

    Args:
        query: ``[num_tokens, num_query_heads, head_size]`` of the plan's dtype.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_size]``.
        value_cache: ``[num_blocks, num_kv_heads, block_size, v_head_size]``.
        out: ``[num_tokens, num_query_heads, v_head_size]``.
        lse: ``[num_tokens, num_query_heads]`` float32.

    Raises:
        ValueError: a tensor that does not match.
    """
    cache = (key_cache.shape[0], plan.num_kv_heads, plan.block_size)
    rows = (query.shape[0], plan.num_query_heads)
    expected: list[tuple[str, torch.Tensor, tuple[int, ...], torch.dtype]] = [
        ("query", query, (*rows, plan.head_size), plan.query_dtype),
        ("key_cache", key_cache, (*cache, plan.head_size), plan.kv_cache_dtype),
        ("value_cache", value_cache, (*cache, plan.v_head_size), plan.kv_cache_dtype),
        ("out", out, (*rows, plan.v_head_size), out.dtype),
        ("lse", lse, rows, torch.float32),
    ]
    for name, tensor, shape, dtype in expected:
        if (
            tensor.shape != shape
            or tensor.dtype != dtype
            or tensor.device != plan.device
        ):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; "
                f"the plan was made for {shape} {dtype} on {plan.device}. Make the "
                "plan for this geometry."
            )
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} in its last dimension; it must "
                "be contiguous there. Call .contiguous() on it."
            )
    if query.shape[0] < plan.num_tokens:
        raise ValueError(
            f"query has {query.shape[0]} rows, the plan {plan.num_tokens}. "
            "Plan the step again from its own query_start_loc."
        )


def check_options(
    plan: DecodeAttentionPlan,
    block_table: torch.Tensor,
    block_positions: torch.Tensor | None,
    block_lens: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Refuse tables or scales that the plan does not cover.

    Args:
        block_table: ``[num_seqs, max_blocks]`` int32.
        block_positions: as ``block_table``, or None.
        block_lens: as ``block_table``, or None.
        k_scale: ``[1]`` or ``[num_kv_heads]`` float32, or None.
        v_scale: as ``k_scale``.

    Raises:
        ValueError: a table or scale that does not match.
    """
    if block_positions is not None and not plan.is_subset:
        raise ValueError(
            "block_positions without num_blocks: the plan cannot know how many blocks "
            "of a request are here. Pass num_blocks to plan_decode_attention."
        )
    for name, table in (
        ("block_table", block_table),
        ("block_positions", block_positions),
        ("block_lens", block_lens),
    ):
        if table is None:
            continue
        fits = table.dim() == 2 and table.shape[0] >= plan.num_seqs
        fits = fits and table.shape[1] >= plan.num_columns
        same_stride = table.stride() == block_table.stride()
        if not fits or not same_stride or table.dtype != torch.int32:
            raise ValueError(
                f"{name} is {tuple(table.shape)} {table.dtype} with strides "
                f"{table.stride()}; the step needs int32 of at least "
                f"({plan.num_seqs}, {plan.num_columns}), all tables with the strides "
                f"of block_table, {block_table.stride()}. Slice them alike."
            )
    if (k_scale is None) != (v_scale is None) or (
        k_scale is not None and plan.kv_cache_dtype != torch.float8_e4m3fn
    ):
        raise ValueError(
            f"k_scale or v_scale with a {plan.kv_cache_dtype} cache, or only one of "
            "them. Pass both with a torch.float8_e4m3fn cache, else neither."
        )


def decode_launch_arguments(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DecodeAttentionPlan,
    *,
    block_table: torch.Tensor,
    softmax_scale: float,
    block_positions: torch.Tensor | None,
    block_lens: torch.Tensor | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> dict[str, Any]:
    """Every argument of the kernel by name.

    Tensors have the shapes and dtypes of ``paged_decode_attention``'s; the caller has
    checked them.
    """
    block_d, tail_d = split_head_size(plan.head_size)
    block_v, tail_v = split_head_size(plan.v_head_size)
    is_view = (
        key_cache.data_ptr() == value_cache.data_ptr()
        and key_cache.stride() == value_cache.stride()
    )
    is_fp8 = plan.kv_cache_dtype == torch.float8_e4m3fn
    if is_fp8 and not plan.tile.native_fp8:
        key_cache, value_cache = (x.view(torch.uint8) for x in (key_cache, value_cache))
    dot_dtype = _TL_DTYPE[plan.query_dtype]
    if is_interpreted() and dot_dtype == tl.bfloat16:
        # The interpreter multiplies the bit patterns of bf16 operands.
        dot_dtype = tl.float32
    return {
        "out_ptr": out,
        "lse_ptr": lse,
        "partial_out_ptr": plan.partial_out,
        "partial_lse_ptr": plan.partial_lse,
        "query_ptr": query,
        "key_cache_ptr": key_cache,
        "value_cache_ptr": value_cache,
        "counts_ptr": plan.counts,
        "work_ptr": plan.work,
        "block_table_ptr": block_table,
        # Arguments of a flag that is off are never read; any pointer will do.
        "block_positions_ptr": _or(block_positions, block_table),
        "block_lens_ptr": _or(block_lens, block_table),
        "k_scale_ptr": _or(k_scale, lse),
        "v_scale_ptr": _or(v_scale, lse),
        "sinks_ptr": _or(sinks, lse),
        "alibi_slopes_ptr": _or(alibi_slopes, lse),
        "softmax_scale": float(softmax_scale),
        "soft_cap": float(soft_cap or 0.0),
        "sliding_window": plan.sliding_window or 0,
        "stride_out_token": out.stride(0),
        "stride_out_head": out.stride(1),
        "stride_lse_token": lse.stride(0),
        "stride_query_token": query.stride(0),
        "stride_query_head": query.stride(1),
        "stride_key_block": key_cache.stride(0),
        "stride_key_head": key_cache.stride(1),
        "stride_key_slot": key_cache.stride(2),
        "stride_value_block": value_cache.stride(0),
        "stride_value_head": value_cache.stride(1),
        "stride_value_slot": value_cache.stride(2),
        "stride_work": plan.work.stride(0),
        "stride_block_table": block_table.stride(0),
        "stride_k_scale": _scale_stride(k_scale),
        "stride_v_scale": _scale_stride(v_scale),
        "NUM_KV_HEADS": plan.num_kv_heads,
        "GROUP_SIZE": plan.group_size,
        "BLOCK_SIZE": plan.block_size,
        "BLOCK_M": plan.tile.block_m,
        "PART_ROWS": plan.part_rows,
        "BLOCK_N": plan.tile.block_n,
        "BLOCK_D": block_d,
        "TAIL_D": tail_d,
        "BLOCK_V": block_v,
        "TAIL_V": tail_v,
        "DOT_DTYPE": dot_dtype,
        "FP8_BITS": is_fp8 and not plan.tile.native_fp8,
        "VALUE_IN_KEY": is_view and block_v == block_d and tail_v == 0,
        "HAS_POSITIONS": block_positions is not None,
        "HAS_BLOCK_LENS": block_lens is not None,
        "HAS_SCALES": k_scale is not None,
        "HAS_SINKS": sinks is not None,
        "HAS_ALIBI": alibi_slopes is not None,
        "HAS_SOFT_CAP": soft_cap is not None,
        "HAS_WINDOW": plan.sliding_window is not None,
        "num_warps": plan.tile.num_warps,
        "num_stages": plan.tile.num_stages,
    }


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if tensor is None else tensor


def _scale_stride(scale: torch.Tensor | None) -> int:
    return 0 if scale is None or scale.numel() == 1 else scale.stride(0)
