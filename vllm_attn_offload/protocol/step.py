# SPDX-License-Identifier: Apache-2.0
"""The STEP frame: what a scheduler step asks of one KV group, checked on arrival."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.protocol.frames import STEP_PREFIX

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_ALIGNMENT = 8
#: No kernel counts further, whatever a pool holds.
_MAX_SEQ_LEN = 1 << 30


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Largest step that a session may be asked to serve, and its pool's size."""

    num_blocks: int
    block_size: int
    max_num_tokens: int
    max_num_reqs: int
    max_blocks_per_req: int

    @property
    def max_step_bytes(self) -> int:
        """Length of the longest STEP payload within these limits."""
        return step_num_bytes(
            self.max_num_reqs, self.max_num_tokens, self.max_blocks_per_req
        )


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """One step of one KV cache group: as vLLM describes it, or one node's share.

    ``query_start_loc`` is int32 ``[num_reqs + 1]`` over the query rows. ``seq_lens`` is
    int32 ``[num_reqs]``: tokens that each query row of a request sees, those stored in
    this step included; in a node's share only tokens on that node count.
    ``slot_mapping`` is int64 ``[num_tokens]`` over the rows to store (-1: do not),
    ``block_table`` int32 ``[num_reqs, width]``. Arrays that were read may be views of a
    receive buffer.
    """

    query_start_loc: Int32Array
    seq_lens: Int32Array
    slot_mapping: Int64Array
    block_table: Int32Array

    @property
    def num_reqs(self) -> int:
        """Requests in the step."""
        return int(self.seq_lens.shape[0])

    @property
    def num_tokens(self) -> int:
        """Rows of k and v in every layer of the step."""
        return int(self.slot_mapping.shape[0])

    @property
    def num_query_rows(self) -> int:
        """Rows of q in every layer of the step."""
        return int(self.query_start_loc[-1])


def step_num_bytes(num_reqs: int, num_tokens: int, table_width: int) -> int:
    """Bytes of a STEP payload: prefix, int32 arrays, padding, int64 slots."""
    int32s = STEP_PREFIX.size + 4 * (2 * num_reqs + 1 + num_reqs * table_width)
    return _aligned(int32s) + 8 * num_tokens


def write_step(step: StepMetadata, buffer: memoryview) -> int:
    """Encode a step into ``buffer[:n]`` and return ``n``, the payload's bytes."""
    num_reqs, width = step.block_table.shape
    STEP_PREFIX.pack_into(
        buffer, 0, num_reqs, step.num_tokens, width, step.num_query_rows
    )
    views = _views(buffer, num_reqs, step.num_tokens, width)
    views.query_start_loc[:] = step.query_start_loc
    views.seq_lens[:] = step.seq_lens
    views.block_table[:] = step.block_table
    views.slot_mapping[:] = step.slot_mapping
    return step_num_bytes(num_reqs, step.num_tokens, width)


def read_step(payload: memoryview, limits: StepLimits) -> StepMetadata:
    """Decode a STEP payload and check every number in it against the session.

    Args:
        payload: Bytes ``[num_bytes]``; the result's arrays are views of it.
        limits: Limits of the session.

    Raises:
        ProtocolError: A count, length, block id or slot is out of range.
    """
    if payload.nbytes < STEP_PREFIX.size:
        raise ProtocolError(f"a STEP frame of {payload.nbytes} bytes is too short")
    num_reqs, num_tokens, width, num_query_rows = STEP_PREFIX.unpack_from(payload, 0)
    _check_range("requests", num_reqs, 0, limits.max_num_reqs)
    _check_range("tokens", num_tokens, 0, limits.max_num_tokens)
    _check_range("block-table columns", width, 0, limits.max_blocks_per_req)
    _check_range("query rows", num_query_rows, 0, limits.max_num_tokens)
    expected = step_num_bytes(num_reqs, num_tokens, width)
    if payload.nbytes != expected:
        raise ProtocolError(
            f"a STEP frame of {payload.nbytes} bytes for {num_reqs} requests, "
            f"{num_tokens} tokens and {width} columns; {expected} bytes are expected"
        )
    step = _views(payload, num_reqs, num_tokens, width)
    _check_queries(step, num_query_rows)
    _check_blocks(step, limits)
    _check_slots(step, limits)
    return step


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _views(
    buffer: memoryview, num_reqs: int, num_tokens: int, width: int
) -> StepMetadata:
    offset = STEP_PREFIX.size
    starts = np.frombuffer(buffer, np.int32, num_reqs + 1, offset)
    offset += starts.nbytes
    lens = np.frombuffer(buffer, np.int32, num_reqs, offset)
    offset += lens.nbytes
    table = np.frombuffer(buffer, np.int32, num_reqs * width, offset)
    offset = _aligned(offset + table.nbytes)
    slots = np.frombuffer(buffer, np.int64, num_tokens, offset)
    return StepMetadata(starts, lens, slots, table.reshape(num_reqs, width))


def _check_range(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ProtocolError(
            f"a step with {value:,} {what}; this session allows {low:,} to {high:,}"
        )


def _check_queries(step: StepMetadata, num_query_rows: int) -> None:
    starts = step.query_start_loc
    # In int64: differences of hostile int32 values would wrap around.
    query_lens = np.diff(starts.astype(np.int64))
    if starts[0] != 0 or starts[-1] != num_query_rows or (query_lens < 0).any():
        raise ProtocolError(
            "query_start_loc must rise from 0 to the number of query rows of the step"
        )


def _check_blocks(step: StepMetadata, limits: StepLimits) -> None:
    if not step.num_reqs:
        return
    width = step.block_table.shape[1]
    # A table may name a block many times, so it does not bound the length.
    pool_tokens = min(limits.num_blocks * limits.block_size, _MAX_SEQ_LEN)
    _check_range("tokens in a request", int(step.seq_lens.min()), 0, pool_tokens)
    _check_range("tokens in a request", int(step.seq_lens.max()), 0, pool_tokens)
    blocks_needed = -(-step.seq_lens.astype(np.int64) // limits.block_size)
    if blocks_needed.max() > width:
        raise ProtocolError(
            f"a request of {int(step.seq_lens.max()):,} tokens needs "
            f"{int(blocks_needed.max()):,} blocks; the step lists {width:,}"
        )
    used = np.arange(width) < blocks_needed[:, None]
    ids = step.block_table[used]
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
