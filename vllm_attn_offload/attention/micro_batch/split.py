# SPDX-License-Identifier: Apache-2.0
"""Where a decode step may be cut into two micro-batches, and where it is best cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_attn_offload.protocol.step import StepMetadata


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Predicted times of a step's parts, in any unit of time.

    Args:
        row: Compute of one row in all layers.
        token: Attention of a request to one of its tokens in all layers.
    """

    row: float = 512.0
    token: float = 1.0


def is_decode_step(batch: StepMetadata, decode_threshold: int) -> bool:
    """True if every request of the step decodes.

    Args:
        batch: A step of one KV group.
        decode_threshold: Most rows of a request that decodes.
    """
    query_lens = np.diff(batch.query_start_loc)
    # Requests without rows only fill a batch.
    return bool(query_lens.min() > 0 and query_lens.max() <= decode_threshold)


def choose_cut(groups: Sequence[StepMetadata], costs: StepCosts) -> int | None:
    """Rows of the first micro-batch, so that both are predicted to take as long.

    While one computes the other is attended: with compute C and attention A the step
    takes about ``max(C0, A1) + max(C1, A0)`` (Lamina, arXiv 2405.01814, section 4.3).

    Args:
        groups: A decode step, as each KV group has it, in which no request
            ``shares_written``.
        costs: Predicted times.

    Returns:
        Where in every group a request ends; None where there is only one.
    """
    # vLLM cuts requests into virtual ones for layers with chunked local attention.
    ends = [group.query_start_loc[1:-1] for group in groups]
    rows = functools.reduce(np.intersect1d, ends).astype(np.int64)
    if not rows.size:
        return None
    batch = groups[0]
    num_reqs = np.searchsorted(batch.query_start_loc, rows)
    all_tokens = batch.seq_lens.cumsum(dtype=np.int64)
    tokens = all_tokens[num_reqs - 1]
    # Kernels read a request's tokens once for all of its rows.
    compute = costs.row * np.stack((rows, batch.num_tokens - rows))
    attention = costs.token * np.stack((tokens, all_tokens[-1] - tokens))
    times = np.maximum(compute, attention[::-1]).sum(0)
    # Where one resource is the longer one all along, many cuts are as good.
    uneven = np.abs(np.diff(compute + attention, axis=0))[0]
    best = np.flatnonzero(times <= times.min() * (1 + 1e-9))
    return int(rows[best[uneven[best].argmin()]])


def shares_written(batch: StepMetadata, block_size: int) -> bool:
    """True if a request of a decode step reads a block that another one completes.

    vLLM caches a block when the step that fills it is scheduled
    (`KVCacheManager.allocate_slots`, running requests first), and a waiting request
    whose prompt is cached up to its last tokens (`get_computed_blocks`) is scheduled in
    the same step with few rows: it looks like a decoding one. Only full blocks are
    cached, so others need not be looked at.
    """
    query_lens = np.diff(batch.query_start_loc)
    num_full = batch.seq_lens // block_size
    if not (num_full > batch.query_positions // block_size).any():
        return False
    offsets = np.arange(batch.num_tokens) - np.repeat(
        batch.query_start_loc[:-1], query_lens
    )
    positions = np.repeat(batch.query_positions, query_lens) + offsets
    is_full = positions // block_size < np.repeat(num_full, query_lens)
    written = np.unique(batch.slot_mapping[is_full] // block_size)
    num_blocks = -(-batch.seq_lens // block_size)
    is_read = np.arange(batch.block_table.shape[1]) < num_blocks[:, None]
    # Every written block is read by its writer, once.
    return np.isin(batch.block_table[is_read], written).sum() > written.shape[0]


def cut_batch(batch: StepMetadata, row: int) -> tuple[StepMetadata, StepMetadata]:
    """The requests of a decode step that end up to ``row``, and the others."""
    starts = batch.query_start_loc
    cut = int(np.searchsorted(starts, row))
    first, second = (
        StepMetadata.whole(
            query_start_loc=bounds - bounds[0],
            seq_lens=batch.seq_lens[requests],
            slot_mapping=batch.slot_mapping[rows],
            block_table=batch.block_table[requests],
        )
        for bounds, requests, rows in (
            (starts[: cut + 1], slice(0, cut), slice(0, row)),
            (starts[cut:], slice(cut, None), slice(row, None)),
        )
    )
    return first, second
