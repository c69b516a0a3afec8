# SPDX-License-Identifier: Apache-2.0
"""Where a decode step may be cut into two micro-batches, and where it is best cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_attn_offload.protocol.step import StepMetadata


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Predicted times of a step's parts, in any unit of time.

    Args:
        row: Compute of one row in all layers.
        token: Attention to one cached token in all layers.
    """

    row: float = 512.0
    token: float = 1.0


def choose_cut(batch: StepMetadata, costs: StepCosts) -> int | None:
    """Requests of the first micro-batch, so that both are predicted to take as long.

    While one computes the other is attended: with compute C and attention A the step
    takes about ``max(C0, A1) + max(C1, A0)`` (Lamina, arXiv 2405.01814, section 4.3).

    Args:
        batch: A step of any KV group, in which no request ``shares_written``.
        costs: Predicted times.

    Returns:
        None where the step must run whole: a request is prefilled, or there is only
        one.
    """
    num_reqs = batch.seq_lens.shape[0]
    if num_reqs < 2 or (np.diff(batch.query_start_loc) != 1).any():
        return None
    rows = np.arange(1, num_reqs)
    tokens = batch.seq_lens.cumsum(dtype=np.int64)
    compute = costs.row * np.stack((rows, num_reqs - rows))
    attention = costs.token * np.stack((tokens[:-1], tokens[-1] - tokens[:-1]))
    times = np.maximum(compute, attention[::-1]).sum(0)
    # Where one resource is the longer one all along, many cuts are as good.
    uneven = np.abs(np.diff(compute + attention, axis=0))[0]
    best = np.flatnonzero(times <= times.min() * (1 + 1e-9))
    return int(rows[best[uneven[best].argmin()]])


def shares_written(batch: StepMetadata, block_size: int) -> bool:
    """True if a request of a decode step reads a block that another one completes.

    vLLM caches a block when the step that fills it is scheduled
    (`KVCacheManager.allocate_slots`, running requests first), and a waiting request
    whose prompt is cached up to its last token (`get_computed_blocks`) is scheduled in
    the same step with one row: it looks like a decoding one. Only full blocks are
    cached, so others need not be looked at.
    """
    is_full = batch.seq_lens % block_size == 0
    if not is_full.any():
        return False
    written = batch.slot_mapping[is_full] // block_size
    num_blocks = -(-batch.seq_lens // block_size)
    is_read = np.arange(batch.block_table.shape[1]) < num_blocks[:, None]
    # Every written block is read by its writer, once.
    return np.isin(batch.block_table[is_read], written).sum() > written.shape[0]


def cut_batch(batch: StepMetadata, cut: int) -> tuple[StepMetadata, StepMetadata]:
    """The first ``cut`` requests of a decode step, and the others."""
    parts = (slice(0, cut), slice(cut, None))
    first, second = (
        StepMetadata.whole(
            query_start_loc=np.arange(
                batch.seq_lens[rows].shape[0] + 1, dtype=np.int32
            ),
            seq_lens=batch.seq_lens[rows],
            slot_mapping=batch.slot_mapping[rows],
            block_table=batch.block_table[rows],
        )
        for rows in parts
    )
    return first, second
