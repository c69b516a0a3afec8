# SPDX-License-Identifier: Apache-2.0
"""Reads STEP frames: everything in them is checked against the session."""

from __future__ import annotations

import numpy as np

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.protocol.frames import STEP_PREFIX
from vllm_attn_offload.protocol.step import (
    StepLimits,
    StepMetadata,
    step_arrays,
    step_num_bytes,
)

#: No kernel counts further, whatever a pool holds.
_MAX_SEQ_LEN = 1 << 30


def read_step(payload: memoryview, limits: StepLimits) -> StepMetadata:
    """Decode a STEP payload and check every number in it against the session.

    Args:
        payload: Bytes ``[num_bytes]``; the result's arrays are views of it.
        limits: Limits of the session.

    Raises:
        ProtocolError: A count, length, position, block or slot is out of range.
    """
    if payload.nbytes < STEP_PREFIX.size:
        raise ProtocolError(f"a STEP frame of {payload.nbytes} bytes is too short")
    counts = STEP_PREFIX.unpack_from(payload, 0)
    num_reqs, num_tokens, width, num_query_rows, has_indices, *_ = counts
    _check_range("requests", num_reqs, 0, limits.max_num_reqs)
    _check_range("tokens", num_tokens, 0, limits.max_num_tokens)
    _check_range("block-table columns", width, 0, limits.max_blocks_per_req)
    _check_range("query rows", num_query_rows, 0, limits.max_num_tokens)
    _check_range("tables of block indices", has_indices, 0, 1)
    expected = step_num_bytes(
        num_reqs, num_tokens, width, has_indices=bool(has_indices)
    )
    if payload.nbytes != expected:
        raise ProtocolError(
            f"a STEP frame of {payload.nbytes} bytes for {num_reqs} requests, "
            f"{num_tokens} tokens and {width} columns; {expected} bytes are expected"
        )
    step = step_arrays(payload, num_reqs, num_tokens, width, bool(has_indices))
    _check_queries(step, num_query_rows)
    if num_reqs:
        _check_positions(step, limits)
        _check_blocks(step, limits)
    _check_slots(step, limits)
    return step


def read_worker_times(payload: memoryview) -> tuple[float, float, float]:
    """Seconds that the sender of a STEP that was read has packed, sent and waited."""
    *_, pack_ns, send_ns, wait_ns = STEP_PREFIX.unpack_from(payload, 0)
    return pack_ns / 1e9, send_ns / 1e9, wait_ns / 1e9


def _check_range(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ProtocolError(
            f"a step with {value:,} {what}; this session allows {low:,} to {high:,}"
        )


def _check_queries(step: StepMetadata, num_query_rows: int) -> None:
    starts = step.query_start_loc
    # Compared, not subtracted: differences of hostile values would wrap around.
    has_fallen = starts[1:] < starts[:-1]
    if starts[0] != 0 or starts[-1] != num_query_rows or has_fallen.any():
        raise ProtocolError(
            "query_start_loc must rise from 0 to the number of query rows of the step"
        )


def _check_positions(step: StepMetadata, limits: StepLimits) -> None:
    max_blocks = -(-_MAX_SEQ_LEN // limits.block_size)
    numbers = np.concatenate((step.seq_lens, step.query_positions, step.first_block))
    # Nearly every step is far from all bounds: they are not looked at one by one.
    if numbers.min() < 0 or int(numbers.max()) + step.num_query_rows > max_blocks:
        _check_each_position(step, max_blocks)
    indices = step.block_indices
    if indices is None or not indices.size:
        return
    _check_range("as the index of a block", int(indices.min()), -1, max_blocks)
    _check_range("as the index of a block", int(indices.max()), -1, max_blocks)
    before, after = indices[:, :-1], indices[:, 1:]
    if not ((before >= 0) & (after > before) | (after == -1)).all():
        raise ProtocolError("block_indices must rise, with -1 behind the last one")


def _check_each_position(step: StepMetadata, max_blocks: int) -> None:
    query_lens = np.diff(step.query_start_loc)
    last = step.query_positions.astype(np.int64) + query_lens
    for what, values, high in (
        ("tokens in a request", step.seq_lens, _MAX_SEQ_LEN),
        ("as the position of a query row", step.query_positions, _MAX_SEQ_LEN),
        ("as the position after a request's rows", last, _MAX_SEQ_LEN),
        ("as the index of a first block", step.first_block, max_blocks),
    ):
        _check_range(what, int(values.min()), 0, high)
        _check_range(what, int(values.max()), 0, high)


def _check_blocks(step: StepMetadata, limits: StepLimits) -> None:
    table, width = step.block_table, step.block_table.shape[1]
    if step.block_indices is None and table.size:
        # Nearly every table has no wrong id even where nobody looks.
        most = -(-int(step.seq_lens.max()) // limits.block_size)
        is_short = most <= min(width, limits.num_blocks)
        if is_short and table.min() >= 0 and table.max() < limits.num_blocks:
            return
    columns = step.num_columns(limits.block_size)
    most = int(columns.max())
    # A table may name a block many times, but reads no more than a pool at once.
    _check_range("blocks of a request", most, 0, limits.num_blocks)
    if most > width:
        raise ProtocolError(
            f"a request of {int(step.seq_lens.max()):,} tokens needs {most:,} blocks; "
            f"the step lists {width:,}"
        )
    used = np.arange(width) < columns[:, None]
    ids = table[used]
    if ids.size and (ids.min() < 0 or ids.max() >= limits.num_blocks):
        raise ProtocolError(
            f"block ids from {int(ids.min())} to {int(ids.max())}; this session has "
            f"blocks 0 to {limits.num_blocks - 1}"
        )


def _check_slots(step: StepMetadata, limits: StepLimits) -> None:
    slots = step.slot_mapping
    num_slots = limits.num_blocks * limits.block_size
    if slots.size and (slots.min() < -1 or slots.max() >= num_slots):
        raise ProtocolError(
            f"slots from {int(slots.min())} to {int(slots.max())}; this session has "
            f"slots 0 to {num_slots - 1}, and -1"
        )
