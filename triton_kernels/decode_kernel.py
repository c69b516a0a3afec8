# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""The kernel of ``paged_decode_attention``: one pass over K and V per KV head.

Grid: work items x KV heads; the merge of split items is ``merge_attn_states``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_scores import (
    LOG2_E,
    find_keys,
    load_rows,
    mask_scores,
    read_item,
    store_rows,
    update_state,
)


@triton.jit
def paged_decode_attention_kernel(
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
    q_start, q_len, seen_end, seq, first_row, partial, first, q_position = read_item(
        work_ptr, stride_work
    )
    first_column = tl.load(work_ptr + 5 * stride_work)
    end_column = tl.load(work_ptr + 6 * stride_work)

    rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M], query token x group
    token = rows // GROUP_SIZE
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    row_is_real = token < q_len
    query_position = q_position + token
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    query_row = query_ptr + (q_start + token) * stride_query_token
    query_row += head * stride_query_head
    query = load_rows(query_row, offs_d, row_is_real, DOT_DTYPE, False)
    if TAIL_D > 0:
        tail_d = BLOCK_D + tl.arange(0, TAIL_D)
        query_tail = load_rows(query_row, tail_d, row_is_real, DOT_DTYPE, False)
    if TAIL_V > 0:
        tail_v = BLOCK_V + tl.arange(0, TAIL_V)
        acc_tail = tl.zeros([BLOCK_M, TAIL_V], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of scores * log2(e)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        # A sink is a key without a value: it enters one part only.
        sink = tl.load(sinks_ptr + head, mask=row_is_real, other=0.0) * LOG2_E
        peak = tl.where(first != 0, sink, peak)
        total = tl.where(first != 0, 1.0, total)
    slope = peak  # never read
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
        block, offset, position, live = find_keys(
            *(start, end_slot, end_column, seen_end, q_position, sliding_window),
            *(block_table_ptr, block_positions_ptr, block_lens_ptr),
            *(BLOCK_SIZE, BLOCK_N, HAS_POSITIONS, HAS_BLOCK_LENS, HAS_WINDOW),
        )
        key_row = key_cache_ptr + block * stride_key_block + offset * stride_key_slot
        key = load_rows(key_row, offs_d, live, DOT_DTYPE, FP8_BITS)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if TAIL_D > 0:
            key_tail = load_rows(key_row, tail_d, live, DOT_DTYPE, FP8_BITS)
            scores = tl.dot(
                query_tail, tl.trans(key_tail), scores, input_precision="ieee"
            )
        scores *= score_scale  # [BLOCK_M, BLOCK_N]
        scores = mask_scores(
            *(scores, live, position, query_position, slope, soft_cap, sliding_window),
            *(HAS_ALIBI, HAS_SOFT_CAP, HAS_WINDOW),
        )
        weights, decay, peak, total = update_state(scores, peak, total)
        weights = weights.to(DOT_DTYPE)
        if VALUE_IN_KEY:
            value = key
        else:
            value_row = value_cache_ptr + block * stride_value_block
            value_row += offset * stride_value_slot
            value = load_rows(value_row, offs_v, live, DOT_DTYPE, FP8_BITS)
        acc = tl.dot(weights, value, acc * decay[:, None], input_precision="ieee")
        if TAIL_V > 0:
            value_tail = load_rows(value_row, tail_v, live, DOT_DTYPE, FP8_BITS)
            acc_tail = tl.dot(
                weights, value_tail, acc_tail * decay[:, None], input_precision="ieee"
            )

    has_keys = total != 0.0  # NaN is not "no key"
    total = tl.where(has_keys, total, 1.0)
    norm = value_scale / total
    lse = tl.where(has_keys, peak / LOG2_E + tl.log(total), float("-inf"))
    if partial < 0:
        tokens = q_start + token
        out_row = out_ptr + tokens * stride_out_token + head * stride_out_head
        tl.store(lse_ptr + tokens * stride_lse_token + head, lse, mask=row_is_real)
        store_rows(out_row, offs_v, row_is_real, acc * norm[:, None])
        if TAIL_V > 0:
            store_rows(out_row, tail_v, row_is_real, acc_tail * norm[:, None])
    else:
        state = (partial * NUM_KV_HEADS + kv_head) * PART_ROWS + tl.arange(0, BLOCK_M)
        state_row = partial_out_ptr + state * (BLOCK_V + TAIL_V)
        tl.store(partial_lse_ptr + state, lse, mask=row_is_real)
        store_rows(state_row, offs_v, row_is_real, acc * norm[:, None])
        if TAIL_V > 0:
            store_rows(state_row, tail_v, row_is_real, acc_tail * norm[:, None])
