# SPDX-License-Identifier: Apache-2.0
"""Rows of a step's prefill chunks, as the compiled kernels take them."""

from __future__ import annotations

import numpy as np

from vllm_attn_offload.client.step_partition import Prefill
from vllm_attn_offload.native.kernel_inputs import PlanInput

#: Tokens of a block: one tile of the kernels, of which a chunk's last is padded.
BLOCK_SIZE = 16


class ChunkRows:
    """Chunks whose rows see each other, each in blocks of its own, first to last.

    Rows between chunks are requests without keys: their output is 0.

    Args:
        prefills: In the order of their rows.
        num_tokens: Rows of the step.

    Attributes:
        prefills: As given.
        num_tokens: As given.
        num_blocks: Blocks of all chunks.
        slots: int64 ``[num_tokens]``, -1 between chunks.
    """

    def __init__(self, prefills: tuple[Prefill, ...], num_tokens: int) -> None:
        self.prefills, self.num_tokens, self.num_blocks = prefills, num_tokens, 0
        self.slots = np.full(num_tokens, -1, np.int64)
        starts, lens, first_blocks = [0], [], []
        for prefill in prefills:
            if prefill.begin > starts[-1]:
                starts.append(prefill.begin)
                lens.append(0)
                first_blocks.append(0)
            num_rows = prefill.end - prefill.begin
            first_slot = self.num_blocks * BLOCK_SIZE
            self.slots[prefill.begin : prefill.end] = np.arange(
                first_slot, first_slot + num_rows
            )
            starts.append(prefill.end)
            lens.append(num_rows)
            first_blocks.append(self.num_blocks)
            self.num_blocks += -(-num_rows // BLOCK_SIZE)
        if num_tokens > starts[-1]:
            starts.append(num_tokens)
            lens.append(0)
            first_blocks.append(0)
        self._starts = np.array(starts, np.int32)
        self._lens = np.array(lens, np.int32)
        # Chunks begin at position 0: only distances count.
        self._positions = np.zeros_like(self._lens)
        width = -(-int(self._lens.max()) // BLOCK_SIZE)
        self._table = np.add.outer(
            np.array(first_blocks, np.int32), np.arange(width, dtype=np.int32)
        )

    def plan_input(self, num_query_heads: int, sliding_window: int) -> PlanInput:
        """Arguments of a plan, valid as long as this object is."""
        width = self._table.shape[1]
        return PlanInput(
            query_start_loc=self._starts.ctypes.data,
            seq_lens=self._lens.ctypes.data,
            query_positions=self._positions.ctypes.data,
            block_table=self._table.ctypes.data,
            table_stride=width,
            num_seqs=self._lens.shape[0],
            max_blocks=width,
            num_query_heads=num_query_heads,
            sliding_window=sliding_window,
        )
