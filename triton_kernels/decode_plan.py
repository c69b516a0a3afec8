# SPDX-License-Identifier: Apache-2.0
"""Once per step: cut the KV of every request into work items of about equal length.

The items are rows of a device tensor, so a captured CUDA graph replays with new ones.
"""

from __future__ import annotations

import numpy as np
import torch

from .decode_split import (
    MAX_WAVES,
    ceil_div,
    choose_columns_per_item,
    split_evenly,
)
from .tiles import DecodeTile, architecture_of, choose_decode_tile, split_head_size

# Rows of the work list: what one CTA per KV head does.
# q_start, q_len, seen end, seq, row, column, column end, partial, first, position
WORK_FIELDS = 10
MERGE_FIELDS = 5  # q_start, q_len, row, first partial, number of partials
COUNT_FIELDS = 2  # work items, split tiles
MAX_TOKENS = 1 << 30  # of a request: the kernel counts slots in 32 bits


class DecodeAttentionPlan:
    """Geometry and preallocated buffers of ``paged_decode_attention`` for one KV group.

    Args:
        max_num_seqs: most requests in one step.
        max_query_len: most query rows of one request in one step.
        num_query_heads: query heads attended with this plan.
        num_kv_heads: KV heads attended with this plan; divides ``num_query_heads``.
        head_size: size of a key.
        v_head_size: size of a value.
        block_size: slots of one block.
        query_dtype: dtype of queries and outputs.
        kv_cache_dtype: ``query_dtype`` or ``torch.float8_e4m3fn``.
        device: where the kernels run.
        sliding_window: keys that a row sees, itself included; None means all.
        tile: launch shape; None takes the one of ``tiles.py``.
        num_slots: CTAs that run at once; None means SMs x CTAs per SM.
        fixed_grid: launch for the largest possible plan, as CUDA graphs need.

    Raises:
        ValueError: a size that the kernels cannot do.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        query_dtype: torch.dtype,
        kv_cache_dtype: torch.dtype,
        device: torch.device,
        max_query_len: int = 1,
        v_head_size: int | None = None,
        sliding_window: int | None = None,
        tile: DecodeTile | None = None,
        num_slots: int | None = None,
        fixed_grid: bool = False,
    ) -> None:
        if num_query_heads % num_kv_heads:
            raise ValueError(
                f"num_query_heads={num_query_heads} is not a multiple of "
                f"num_kv_heads={num_kv_heads}. Pass the heads of whole groups."
            )
        if kv_cache_dtype not in (query_dtype, torch.float8_e4m3fn):
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype} with query_dtype={query_dtype}. "
                "Use a cache of the query's dtype or of torch.float8_e4m3fn."
            )
        for size in {head_size, v_head_size or head_size}:
            split_head_size(size)
        self.max_num_seqs = max_num_seqs
        self.max_query_len = max_query_len
        self.num_query_heads = num_query_heads
        self.num_kv_heads = num_kv_heads
        self.group_size = num_query_heads // num_kv_heads
        self.head_size = head_size
        self.v_head_size = head_size if v_head_size is None else v_head_size
        self.block_size = block_size
        self.query_dtype = query_dtype
        self.kv_cache_dtype = kv_cache_dtype
        self.device = device
        # No request is longer, and the kernel subtracts it in 32 bits.
        self.sliding_window = sliding_window and min(sliding_window, MAX_TOKENS)
        self.fixed_grid = fixed_grid
        self.tile = tile or choose_decode_tile(
            architecture_of(device),
            max(head_size, self.v_head_size),
            max_query_len * self.group_size,
            kv_cache_dtype.itemsize,
        )
        if num_slots is None:
            num_slots = _count_slots(device, self.tile)
        self.items_at_once = max(1, num_slots // num_kv_heads)
        self.num_seqs = self.num_tokens = self.num_items = self.num_merges = 0
        self.num_columns = 0
        self.is_subset = False
        self._allocate()

    def _allocate(self) -> None:
        tiles_per_seq = -(-self.max_query_len * self.group_size // self.tile.block_m)
        self.max_merges = self.max_num_seqs * tiles_per_seq
        self.max_items = self.max_merges + MAX_WAVES * self.items_at_once
        sizes = (
            COUNT_FIELDS,
            WORK_FIELDS * self.max_items,
            MERGE_FIELDS * self.max_merges,
        )
        flat = torch.zeros(sum(sizes), dtype=torch.int32, device=self.device)
        # "cuda" becomes "cuda:0", as tensors there say.
        self.device = flat.device
        self._flat = flat
        self.counts, work, merges = flat.split(sizes)
        self.work = work.view(WORK_FIELDS, self.max_items)
        self.merges = merges.view(MERGE_FIELDS, self.max_merges)
        on_gpu = self.device.type == "cuda"
        # Filled by the host while the copy of the step before may still be running:
        # pinned, and guarded by an event.
        self._staging = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=on_gpu)
        ends = np.cumsum(sizes)[:-1]
        staged_counts, staged_work, staged_merges = np.split(
            self._staging.numpy(), ends
        )
        self._staged = (
            staged_counts,
            staged_work.reshape(self.work.shape),
            staged_merges.reshape(self.merges.shape),
        )
        self._copied = torch.cuda.Event() if on_gpu else None
        self.part_rows = min(self.tile.block_m, self.max_query_len * self.group_size)
        rows = (self.max_items, self.num_kv_heads, self.part_rows)
        self.partial_out = torch.empty((*rows, self.v_head_size), device=self.device)
        self.partial_lse = torch.empty(rows, device=self.device)

    def write(self, work: np.ndarray, merges: np.ndarray) -> None:
        """Copy the lists of one step to the device, on the current stream.

        Args:
            work: integers ``[WORK_FIELDS, num_items]``.
            merges: integers ``[MERGE_FIELDS, num_merges]``.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self.num_items, self.num_merges = work.shape[1], merges.shape[1]
        counts, work_rows, merge_rows = self._staged
        counts[:] = self.num_items, self.num_merges
        work_rows[:, : self.num_items] = work
        merge_rows[:, : self.num_merges] = merges
        self._flat.copy_(self._staging, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _count_slots(device: torch.device, tile: DecodeTile) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count) * tile.ctas_per_sm


def plan_decode_attention(
    plan: DecodeAttentionPlan,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_blocks: torch.Tensor | None = None,
    *,
    query_positions: torch.Tensor | None = None,
    first_block: torch.Tensor | None = None,
    first_column: torch.Tensor | None = None,
) -> DecodeAttentionPlan:
    """Fill ``plan`` for one step; every layer of the step then uses it.

    Args:
        plan: preallocated buffers; overwritten.
        query_start_loc: ``[num_seqs + 1]`` int32 on the CPU, prefix sum of query rows.
        seq_lens: ``[num_seqs]`` int32 on the CPU, tokens that may be read.
        num_blocks: ``[num_seqs]`` int32 on the CPU, blocks of each request that this
            device holds; needed with ``block_positions``. None: all of them.
        query_positions: ``[num_seqs]`` int32 on the CPU, position of each request's
            first row. None: its rows are the last of its tokens.
        first_block: ``[num_seqs]`` int32 on the CPU, index in the request of the block
            in column 0, where ``num_blocks`` is None. None: 0.
        first_column: ``[num_seqs]`` int32 on the CPU, with ``num_blocks``: columns
            before it hold nothing that a row sees. None: 0.

    Returns:
        ``plan``.

    Raises:
        ValueError: the step does not fit the plan's buffers or `MAX_TOKENS`.
    """
    # NumPy, because torch takes three times as long for arrays as small as these.
    starts, lens = _int64(query_start_loc), _int64(seq_lens)
    query_lens = np.diff(starts)
    _check_step(plan, query_lens, lens)
    positions = lens - query_lens
    if query_positions is not None:
        positions = _int64(query_positions)
    _check_lengths(np.concatenate([lens, positions + query_lens]))
    if first_block is not None:
        # The kernel counts from the table's first column.
        skipped = _int64(first_block) * plan.block_size
        lens, positions = lens - skipped, positions - skipped
    # Keys behind the last row are seen by none.
    seen_end = np.maximum(np.minimum(lens, positions + query_lens), 0)
    if num_blocks is not None:
        end_column = _int64(num_blocks)
        _check_lengths((end_column - 1) * plan.block_size)
        begin_column = np.zeros_like(lens)
        if first_column is not None:
            begin_column = np.minimum(_int64(first_column), end_column)
    else:
        end_column = ceil_div(seen_end, plan.block_size)
        begin_column = np.zeros_like(lens)
        if plan.sliding_window is not None:
            oldest = np.maximum(positions - plan.sliding_window + 1, 0)
            begin_column = np.minimum(oldest // plan.block_size, end_column)
    tiles_per_seq = ceil_div(query_lens * plan.group_size, plan.tile.block_m)
    seq = np.arange(lens.size).repeat(tiles_per_seq)
    row = plan.tile.block_m * _position_in_run(tiles_per_seq)
    columns = (end_column - begin_column)[seq]
    splits, step = split_evenly(
        columns,
        choose_columns_per_item(
            columns, plan.block_size, plan.tile.block_n, plan.items_at_once
        ),
    )

    tile = np.arange(splits.size).repeat(splits)
    part = _position_in_run(splits)
    is_split = splits > 1
    partial = np.where(is_split[tile], is_split[tile].cumsum() - 1, -1)
    owner = seq[tile]
    begin = begin_column[owner] + part * step[tile]
    end = np.minimum(begin + step[tile], end_column[owner])
    work = np.stack(
        [
            *(starts[owner], query_lens[owner], seen_end[owner], owner, row[tile]),
            *(begin, end, partial, part == 0, positions[owner]),
        ]
    )
    # Longest first: the hardware starts CTAs in order, and short ones fill the tail.
    work = work[:, np.argsort(begin - end, kind="stable")]
    first_partial = (splits * is_split).cumsum() - splits
    merges = np.stack([starts[seq], query_lens[seq], row, first_partial, splits])
    plan.num_seqs, plan.num_tokens = lens.size, int(starts[-1])
    plan.num_columns = int(end_column.max(initial=0))
    plan.is_subset = num_blocks is not None
    plan.write(work, merges[:, is_split])
    return plan


def _check_step(
    plan: DecodeAttentionPlan, query_lens: np.ndarray, seq_lens: np.ndarray
) -> None:
    if seq_lens.size > plan.max_num_seqs:
        raise ValueError(
            f"{seq_lens.size} requests; the plan holds {plan.max_num_seqs}. "
            "Create it with a larger max_num_seqs."
        )
    if query_lens.size != seq_lens.size or (query_lens < 0).any():
        raise ValueError(
            f"query_start_loc describes {query_lens.size} requests, seq_lens "
            f"{seq_lens.size}. Pass one more start than requests, in rising order."
        )
    longest = query_lens.max(initial=0)
    if longest > plan.max_query_len:
        raise ValueError(
            f"{longest} query rows in one request; the plan holds "
            f"{plan.max_query_len}. Create it with a larger max_query_len."
        )


def _check_lengths(tokens: np.ndarray) -> None:
    longest = tokens.max(initial=0)
    if longest > MAX_TOKENS:
        raise ValueError(
            f"{longest} tokens in one request; the kernels take {MAX_TOKENS}. "
            "Lower max_model_len."
        )


def _position_in_run(lengths: np.ndarray) -> np.ndarray:
    """``[2, 0, 3] -> [0, 1, 0, 1, 2]``."""
    starts = (lengths.cumsum() - lengths).repeat(lengths)
    return np.arange(starts.size) - starts


def _int64(values: torch.Tensor) -> np.ndarray:
    return values.numpy().astype(np.int64)
