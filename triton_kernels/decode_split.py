# SPDX-License-Identifier: Apache-2.0
"""How long a work item is, so that a step is over soonest."""

from __future__ import annotations

import math

import numpy as np

#: A step is cut for so many rounds of CTAs at most.
MAX_WAVES = 4
# At 3.35 TB/s over 264 CTAs one CTA reads about 25 tokens of 512 bytes (K and V in
# bf16 at head size 128) per microsecond; starting and ending a CTA is taken as 2 us,
# the merge launch as 4 us. Estimates, not fitted to the times in README.md.
_ITEM_OVERHEAD_TOKENS = 48
_MERGE_OVERHEAD_TOKENS = 96


def ceil_div(number: np.ndarray, divisor: np.ndarray | int) -> np.ndarray:
    """Quotient of integers, rounded up."""
    return -(-number // divisor)


def split_evenly(columns: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts per tile and columns per part: 65 in parts of 64 become 33 + 32.

    Args:
        columns: ``[num_tiles]`` int64, of a block table.
        longest: Columns of a part at most.
    """
    splits = np.maximum(ceil_div(columns, longest), 1)
    step = np.maximum(ceil_div(columns, splits), 1)
    return np.maximum(ceil_div(columns, step), 1), step


def choose_columns_per_item(
    columns: np.ndarray, block_size: int, block_n: int, items_at_once: int
) -> int:
    """Longest item, in table columns, of the split with the shortest estimated time.

    CTAs of one wave take as long as the longest of them; with items sorted by length
    that is every ``items_at_once``-th one. An upper bound: near the end fewer CTAs
    share the bandwidth and each runs faster.

    Args:
        columns: ``[num_tiles]`` int64, of a block table.
        block_size: Tokens of a column.
        block_n: Tokens that a CTA reads at once.
        items_at_once: Items that run at the same time.
    """
    granule = max(1, block_n // block_size)
    total = int(columns.sum())
    best_step, best_time = granule, math.inf
    for waves in range(1, MAX_WAVES + 1):
        longest = -(-total // (items_at_once * waves))
        longest = max(granule, -(-longest // granule) * granule)
        splits, step = split_evenly(columns, longest)
        lengths = np.sort(step.repeat(splits))[::-1]
        critical = lengths[::items_at_once]
        time = int(critical.sum()) * block_size
        time += _ITEM_OVERHEAD_TOKENS * critical.size
        time += _MERGE_OVERHEAD_TOKENS * (lengths.size > columns.size)
        if time < best_time:
            best_step, best_time = longest, time
    return best_step
