# SPDX-License-Identifier: Apache-2.0
"""The STEP frame: what a scheduler step asks of one KV group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_attn_offload.protocol.frames import STEP_PREFIX

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_ALIGNMENT = 8
#: Nanoseconds that a worker has packed, sent and waited.
WorkerTimes = tuple[int, int, int]
_NO_TIMES: WorkerTimes = (0, 0, 0)


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
            self.max_num_reqs,
            self.max_num_tokens,
            self.max_blocks_per_req,
            has_indices=True,
        )


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """One step of one KV cache group: as vLLM describes it, or one node's share.

    A query row sees tokens up to its own position, its own included, of those that the
    table's blocks hold and a layer's window shows. Arrays that were read may be views
    of a receive buffer.

    Attributes:
        query_start_loc: int32 ``[num_reqs + 1]`` over the query rows.
        seq_lens: int32 ``[num_reqs]``: a request's tokens that are stored by the end of
            the step, or those that the rows here may see.
        slot_mapping: int64 ``[num_tokens]`` over the rows to store; -1: do not.
        block_table: int32 ``[num_reqs, width]``; a column past a request's last block
            holds anything.
        query_positions: int32 ``[num_reqs]``: position in the request of its first
            query row; the others follow.
        first_block: int32 ``[num_reqs]``: index in the request of the block in column
            0; the others follow.
        block_indices: int32 ``[num_reqs, width]``: index in the request of each
            column's block, rising, and -1 behind the last one. None: by
            ``first_block``, which counts no more where these are given.
    """

    query_start_loc: Int32Array
    seq_lens: Int32Array
    slot_mapping: Int64Array
    block_table: Int32Array
    query_positions: Int32Array
    first_block: Int32Array
    block_indices: Int32Array | None = None

    @classmethod
    def whole(
        cls,
        query_start_loc: Int32Array,
        seq_lens: Int32Array,
        slot_mapping: Int64Array,
        block_table: Int32Array,
    ) -> StepMetadata:
        """A step whose query rows are the last tokens, and whose tables are whole."""
        positions = (seq_lens - np.diff(query_start_loc)).astype(np.int32)
        first_block = np.zeros(seq_lens.shape[0], np.int32)
        return cls(
            query_start_loc,
            seq_lens,
            slot_mapping,
            block_table,
            positions,
            first_block,
        )

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

    @property
    def num_bytes(self) -> int:
        """Bytes of the STEP payload."""
        return step_num_bytes(
            self.num_reqs,
            self.num_tokens,
            self.block_table.shape[1],
            has_indices=self.block_indices is not None,
        )

    def tokens_held(self, block_size: int) -> Int64Array:
        """Tokens in the blocks of each request's row of the table, ``[num_reqs]``."""
        if self.block_indices is None:
            before = np.multiply(self.first_block, block_size, dtype=np.int64)
            return np.maximum(self.seq_lens - before, 0)
        lens = self.seq_lens.astype(np.int64)
        indices = self.block_indices.astype(np.int64)
        tokens = np.clip(lens[:, None] - indices * block_size, 0, block_size)
        return np.where(indices >= 0, tokens, 0).sum(1)

    def num_columns(self, block_size: int) -> Int64Array:
        """Columns of each request's row of the table that hold blocks."""
        if self.block_indices is not None:
            return (self.block_indices >= 0).sum(1)
        num_blocks = (self.seq_lens.astype(np.int64) + (block_size - 1)) // block_size
        return np.maximum(num_blocks - self.first_block, 0)


def step_num_bytes(
    num_reqs: int, num_tokens: int, table_width: int, *, has_indices: bool = False
) -> int:
    """Bytes of a STEP payload: prefix, int32 arrays, padding, int64 slots."""
    table = num_reqs * table_width * (2 if has_indices else 1)
    int32s = STEP_PREFIX.size + 4 * (4 * num_reqs + 1 + table)
    return _aligned(int32s) + 8 * num_tokens


def write_step(
    step: StepMetadata, buffer: memoryview, times: WorkerTimes = _NO_TIMES
) -> int:
    """Encode a step into ``buffer[:n]`` and return ``n``, the payload's bytes."""
    num_reqs, width = step.block_table.shape
    indices = step.block_indices
    counts = (num_reqs, step.num_tokens, width, step.num_query_rows)
    STEP_PREFIX.pack_into(buffer, 0, *counts, indices is not None, *times)
    views = step_arrays(buffer, num_reqs, step.num_tokens, width, indices is not None)
    views.query_start_loc[:] = step.query_start_loc
    views.seq_lens[:] = step.seq_lens
    views.query_positions[:] = step.query_positions
    views.first_block[:] = step.first_block
    views.block_table[:] = step.block_table
    if views.block_indices is not None and indices is not None:
        views.block_indices[:] = indices
    views.slot_mapping[:] = step.slot_mapping
    return step.num_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def step_arrays(
    buffer: memoryview, num_reqs: int, num_tokens: int, width: int, has_indices: bool
) -> StepMetadata:
    """Lay a step's arrays over a STEP payload, whose length is known to suit them."""
    # Slices of one array: each made from the buffer takes three times as long.
    per_req, table = num_reqs + 1, num_reqs * width
    count = 4 * num_reqs + 1 + (2 * table if has_indices else table)
    words = np.frombuffer(buffer, np.int32, count, STEP_PREFIX.size)
    slots_at = _aligned(STEP_PREFIX.size + words.nbytes)
    slots = np.frombuffer(buffer, np.int64, num_tokens, slots_at)
    tables_at = per_req + 3 * num_reqs
    starts = words[:per_req]
    lens, positions, first_block = words[per_req:tables_at].reshape(3, num_reqs)
    blocks, *indices = words[tables_at:].reshape(1 + has_indices, num_reqs, width)
    return StepMetadata(starts, lens, slots, blocks, positions, first_block, *indices)
