# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Split-KV decode attention over a block table, returning (out, lse).

out = softmax(scale * q k^T) v per query head, lse = log sum exp(scores), in one pass
over K and V per KV head. Grid: (work items x KV heads), then one merge program per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .decode_arguments import check_options, check_tensors, decode_launch_arguments
from .decode_plan import DecodeAttentionPlan
from .merge_attn_states import launch_merge_parts

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(row_ptr, offs_d, live, DTYPE: tl.constexpr, FP8_BITS: tl.constexpr):
    """Load ``[BLOCK_N, BLOCK_D]``; rows that are not live read as 0, so that whatever
    an unused slot holds cannot reach the output through 0 x NaN."""
    rows = tl.load(row_ptr[:, None] + offs_d[None, :], mask=live[:, None], other=0.0)
    if FP8_BITS:
        # e4m3 shifted into fp16 is the value / 256, subnormals included; the caller
        # multiplies by 256. sm_80 has no e4m3 conversion.
        bits = rows.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        rows = bits.to(tl.float16, bitcast=True)
    return rows.to(DTYPE)


@triton.jit
def _store_rows(row_ptr, offs_d, row_is_real, rows):
    tl.store(
        row_ptr[:, None] + offs_d[None, :],
        rows.to(row_ptr.dtype.element_ty),
        mask=row_is_real[:, None],
    )


@triton.jit
def _paged_decode_attention_kernel(
    out_ptr,  # [num_tokens, num_query_heads, v_head_size]
    lse_ptr,  # [num_tokens, num_query_heads] fp32
    partial_out_ptr,  # [max_items, num_kv_heads, PART_ROWS, v_head_size] fp32
    partial_lse_ptr,  # [max_items, num_kv_heads, PART_ROWS] fp32
    query_ptr,  # [num_tokens, num_query_heads, head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache_ptr,  # [num_blocks, num_kv_heads, block_size, v_head_size]
    counts_ptr,  # [2] int32: work items, split tiles
    work_ptr,  # [WORK_FIELDS, max_items] int32
    block_table_ptr,  # [num_seqs, max_blocks] int32
    block_positions_ptr,  # [num_seqs, max_blocks] int32
    block_lens_ptr,  # [num_seqs, max_blocks] int32
    k_scale_ptr,  # [1] or [num_kv_heads] fp32
    v_scale_ptr,  # [1] or [num_kv_heads] fp32
    sinks_ptr,  # [num_query_heads] fp32
    alibi_slopes_ptr,  # [num_query_heads] fp32
    softmax_scale,
    soft_cap,
    sliding_window,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_query_token,
    stride_query_head,
    stride_key_block,
    stride_key_head,
    stride_key_slot,
    stride_value_block,
    stride_value_head,
    stride_value_slot,
    stride_work,
    stride_block_table,
    stride_k_scale,
    stride_v_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PART_ROWS: tl.constexpr,  # rows of a tile that exist, at most BLOCK_M
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # head_size = BLOCK_D + TAIL_D, both powers of two
    TAIL_D: tl.constexpr,
    BLOCK_V: tl.constexpr,  # v_head_size = BLOCK_V + TAIL_V
    TAIL_V: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    FP8_BITS: tl.constexpr,
    VALUE_IN_KEY: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_BLOCK_LENS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    # grid: (work items * NUM_KV_HEADS), KV head fastest: neighbours share blocks
    item = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    if item >= tl.load(counts_ptr):
        return
    work_ptr += item
    q_start = tl.load(work_ptr).to(tl.int64)
    q_len = tl.load(work_ptr + stride_work)
    seq_len = tl.load(work_ptr + 2 * stride_work)
    seq = tl.load(work_ptr + 3 * stride_work).to(tl.int64)
    first_row = tl.load(work_ptr + 4 * stride_work)
    first_column = tl.load(work_ptr + 5 * stride_work)
    end_column = tl.load(work_ptr + 6 * stride_work)
    partial = tl.load(work_ptr + 7 * stride_work).to(tl.int64)
    is_first_part = tl.load(work_ptr + 8 * stride_work)

    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M], query token x group
    token = rows // GROUP_SIZE
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    row_is_real = token < q_len
    query_position = seq_len - q_len + token if IS_CAUSAL else seq_len + 0 * token
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    query_row = query_ptr + (q_start + token) * stride_query_token
    query_row += head * stride_query_head
    query = _load_rows(query_row, offs_d, row_is_real, DOT_DTYPE, False)
    if TAIL_D > 0:
        tail_d = BLOCK_D + tl.arange(0, TAIL_D)
        query_tail = _load_rows(query_row, tail_d, row_is_real, DOT_DTYPE, False)
    if TAIL_V > 0:
        tail_v = BLOCK_V + tl.arange(0, TAIL_V)
        acc_tail = tl.zeros([BLOCK_M, TAIL_V], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of scores * log2(e)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        # A sink is a key without a value: it enters one part only.
        sink = tl.load(sinks_ptr + head, mask=row_is_real, other=0.0) * _LOG2_E
        peak = tl.where(is_first_part != 0, sink, peak)
        total = tl.where(is_first_part != 0, 1.0, total)
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes_ptr + head, mask=row_is_real, other=0.0)
    score_scale = softmax_scale
    value_scale = 1.0
    if HAS_SCALES:
        score_scale *= tl.load(k_scale_ptr + kv_head * stride_k_scale)
        value_scale *= tl.load(v_scale_ptr + kv_head * stride_v_scale)
    if FP8_BITS:
        score_scale *= 256.0
        value_scale *= 256.0
    key_cache_ptr += kv_head.to(tl.int64) * stride_key_head
    value_cache_ptr += kv_head.to(tl.int64) * stride_value_head
    block_table_ptr += seq * stride_block_table
    block_positions_ptr += seq * stride_block_table
    block_lens_ptr += seq * stride_block_table

    end_slot = end_column * BLOCK_SIZE
    for start in tl.range(first_column * BLOCK_SIZE, end_slot, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        live = slot < end_slot
        if BLOCK_SIZE % BLOCK_N == 0:
            column = start // BLOCK_SIZE
            block = tl.load(block_table_ptr + column).to(tl.int64)
        else:
            # Past the end the last column is read again: valid memory, masked below.
            column = tl.minimum(slot // BLOCK_SIZE, end_column - 1)
            block = tl.load(block_table_ptr + column).to(tl.int64)
        offset = slot % BLOCK_SIZE
        position = slot
        if HAS_POSITIONS:
            position = tl.load(block_positions_ptr + column) + offset
        live &= position < seq_len
        if HAS_BLOCK_LENS:
            live &= offset < tl.load(block_lens_ptr + column)
        if HAS_WINDOW:
            # Blocks behind the window may already belong to somebody else.
            live &= position > seq_len - q_len - sliding_window

        key_row = key_cache_ptr + block * stride_key_block + offset * stride_key_slot
        key = _load_rows(key_row, offs_d, live, DOT_DTYPE, FP8_BITS)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if TAIL_D > 0:
            key_tail = _load_rows(key_row, tail_d, live, DOT_DTYPE, FP8_BITS)
            scores = tl.dot(
                query_tail, tl.trans(key_tail), scores, input_precision="ieee"
            )
        scores *= score_scale  # [BLOCK_M, BLOCK_N]
        if HAS_SOFT_CAP:
            power = tl.exp2(scores * (2 * _LOG2_E / soft_cap))
            scores = soft_cap * (1.0 - 2.0 / (power + 1.0))
        distance = position[None, :] - query_position[:, None]
        if HAS_ALIBI:
            scores += slope[:, None] * distance
        visible = live[None, :] & (distance <= 0)
        if HAS_WINDOW:
            visible &= distance > -sliding_window
        scores = tl.where(visible, scores * _LOG2_E, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])  # [BLOCK_M, BLOCK_N]
        decay = tl.exp2(peak - shift)  # [BLOCK_M]
        total = total * decay + tl.sum(weights, axis=1)
        peak = new_peak
        weights = weights.to(DOT_DTYPE)
        if VALUE_IN_KEY:
            value = key
        else:
            value_row = value_cache_ptr + block * stride_value_block
            value_row += offset * stride_value_slot
            value = _load_rows(value_row, offs_v, live, DOT_DTYPE, FP8_BITS)
        acc = tl.dot(weights, value, acc * decay[:, None], input_precision="ieee")
        if TAIL_V > 0:
            value_tail = _load_rows(value_row, tail_v, live, DOT_DTYPE, FP8_BITS)
            acc_tail = tl.dot(
                weights, value_tail, acc_tail * decay[:, None], input_precision="ieee"
            )

    has_keys = total > 0.0
    total = tl.where(has_keys, total, 1.0)
    norm = value_scale / total
    lse = tl.where(has_keys, peak / _LOG2_E + tl.log(total), float("-inf"))
    if partial < 0:
        tokens = q_start + token
        out_row = out_ptr + tokens * stride_out_token + head * stride_out_head
        _store_rows(out_row, offs_v, row_is_real, acc * norm[:, None])
        if TAIL_V > 0:
            _store_rows(out_row, tail_v, row_is_real, acc_tail * norm[:, None])
        tl.store(lse_ptr + tokens * stride_lse_token + head, lse, mask=row_is_real)
    else:
        state = (partial * NUM_KV_HEADS + kv_head) * PART_ROWS + tl.arange(0, BLOCK_M)
        state_row = partial_out_ptr + state * (BLOCK_V + TAIL_V)
        _store_rows(state_row, offs_v, row_is_real, acc * norm[:, None])
        if TAIL_V > 0:
            _store_rows(state_row, tail_v, row_is_real, acc_tail * norm[:, None])
        tl.store(partial_lse_ptr + state, lse, mask=row_is_real)


def paged_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DecodeAttentionPlan,
    *,
    block_table: torch.Tensor,
    softmax_scale: float,
    block_positions: torch.Tensor | None = None,
    block_lens: torch.Tensor | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the planned query rows over the KV blocks that this device holds.

    A row sees the keys at logical positions up to its own (and inside the plan's
    window), or all where the plan is not causal. A row that sees none gets out = 0 and
    lse = -inf, ready to be merged. Shards of heads need no copy: pass views, every
    tensor is addressed by strides.

    Args:
        query: ``[num_tokens, num_query_heads, head_size]``, rows of a request adjacent.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_size]``.
        value_cache: ``[num_blocks, num_kv_heads, block_size, v_head_size]``. If it is
            a view of the first columns of ``key_cache``, each key is read once.
        plan: filled by ``plan_decode_attention`` for this step.
        block_table: ``[num_seqs, max_blocks]`` int32, held blocks of each request;
            what follows the planned ones is not read.
        softmax_scale: factor of ``q k^T``.
        block_positions: ``[num_seqs, max_blocks]`` int32, logical position of each
            block's first token; None: column x block_size.
        block_lens: ``[num_seqs, max_blocks]`` int32, valid tokens of each block;
            None: up to the request's length.
        soft_cap: ``cap * tanh(score / cap)``, before ALiBi.
        sinks: ``[num_query_heads]`` float32, a logit without a value. Pass it on one
            device only when partial results are merged.
        alibi_slopes: ``[num_query_heads]`` float32, times (key - query position).
        k_scale: ``[1]`` or ``[num_kv_heads]`` float32, multiplies an fp8 key.
        v_scale: likewise for values; both or neither.
        out: ``[num_tokens, num_query_heads, v_head_size]``; allocated if None.
        lse: ``[num_tokens, num_query_heads]`` float32; allocated if None.

    Returns:
        (out, lse); lse is the natural logarithm.

    Raises:
        ValueError: a tensor does not match the plan.
    """
    if out is None:
        out = query.new_empty((*query.shape[:2], plan.v_head_size))
    if lse is None:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    check_tensors(query, key_cache, value_cache, plan, out, lse)
    check_options(plan, block_table, block_positions, block_lens, k_scale, v_scale)
    num_items = plan.max_items if plan.fixed_grid else plan.num_items
    if num_items:
        arguments = decode_launch_arguments(
            query,
            key_cache,
            value_cache,
            plan,
            block_table=block_table,
            softmax_scale=softmax_scale,
            block_positions=block_positions,
            block_lens=block_lens,
            soft_cap=soft_cap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
            lse=lse,
        )
        _paged_decode_attention_kernel[(num_items * plan.num_kv_heads,)](**arguments)
    launch_merge_parts(plan, out, lse)
    return out, lse
