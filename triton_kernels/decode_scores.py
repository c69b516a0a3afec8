# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Steps of the decode-attention kernel: keys of a tile, their scores, the softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(row_ptr, offs_d, live, DTYPE: tl.constexpr, FP8_BITS: tl.constexpr):
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
def store_rows(row_ptr, offs_d, row_is_real, rows):
    tl.store(
        row_ptr[:, None] + offs_d[None, :],
        rows.to(row_ptr.dtype.element_ty),
        mask=row_is_real[:, None],
    )


@triton.jit
def read_item(work_ptr, stride_work):
    """Query start and length, end of the keys, request, first row, partial, is first,
    position of the request's first row."""
    return (
        tl.load(work_ptr).to(tl.int64),
        tl.load(work_ptr + stride_work),
        tl.load(work_ptr + 2 * stride_work),
        tl.load(work_ptr + 3 * stride_work).to(tl.int64),
        tl.load(work_ptr + 4 * stride_work),
        tl.load(work_ptr + 7 * stride_work).to(tl.int64),
        tl.load(work_ptr + 8 * stride_work),
        tl.load(work_ptr + 9 * stride_work),
    )


@triton.jit
def find_keys(
    start,
    end_slot,
    end_column,
    seen_end,
    q_position,
    sliding_window,
    block_table_ptr,
    block_positions_ptr,
    block_lens_ptr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_BLOCK_LENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Block, slot within it, logical position and liveness of BLOCK_N keys.

    Without positions of blocks they count from column 0, as do the item's.

    32 bits are enough: the plan bounds lengths and columns to 2^30 tokens.
    """
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
    live &= position < seen_end
    if HAS_BLOCK_LENS:
        live &= offset < tl.load(block_lens_ptr + column)
    if HAS_WINDOW:
        # Blocks behind the window may already belong to somebody else.
        live &= position > q_position - sliding_window
    return block, offset, position, live


@triton.jit
def mask_scores(
    scores,  # [BLOCK_M, BLOCK_N], query x key
    live,
    position,
    query_position,
    slope,
    soft_cap,
    sliding_window,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Scores * log2(e), -inf where the row does not see the key."""
    if HAS_SOFT_CAP:
        power = tl.exp2(scores * (2 * LOG2_E / soft_cap))
        scores = soft_cap * (1.0 - 2.0 / (power + 1.0))
    distance = position[None, :] - query_position[:, None]
    if HAS_ALIBI:
        scores += slope[:, None] * distance
    visible = live[None, :] & (distance <= 0)
    if HAS_WINDOW:
        visible &= distance > -sliding_window
    return tl.where(visible, scores * LOG2_E, float("-inf"))


@triton.jit
def update_state(scores, peak, total):
    """Weights of the keys, decay of what was summed before, new maximum and sum."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - shift[:, None])  # [BLOCK_M, BLOCK_N]
    decay = tl.exp2(peak - shift)  # [BLOCK_M]
    return weights, decay, new_peak, total * decay + tl.sum(weights, axis=1)
