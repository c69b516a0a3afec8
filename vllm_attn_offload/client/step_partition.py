# SPDX-License-Identifier: Apache-2.0
"""Divides a scheduler step between the memory nodes and the compute node.

Prefill is compute-bound and stays: only rows whose keys lie on the nodes are sent there
(Lamina, arXiv 2405.01814, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_attn_offload.client.partition import Partition
from vllm_attn_offload.protocol.step import Int32Array, Int64Array, StepMetadata

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class NodeShare:
    """One node's share of a step.

    Args:
        step: Sent as the STEP frame.
        positions: int64 ``[num_query_rows]`` among the remote rows; None: all.
        query_rows: The same as rows of the batch; None: all of the batch.
        stored_rows: Rows of the batch whose k, v it stores; None: all.
    """

    step: StepMetadata
    positions: Int64Array | None
    query_rows: Int64Array | None
    stored_rows: Int64Array | None


@dataclass(frozen=True, slots=True)
class Prefill:
    """A request's rows ``[begin, end)`` that attend to each other on the compute node;
    with ``has_context`` they attend to cached tokens on the nodes, too."""

    begin: int
    end: int
    has_context: bool


@dataclass(frozen=True, slots=True)
class StepPartition:
    """A step, divided.

    Args:
        num_tokens: Rows of the batch.
        remote_rows: Rows of the batch that nodes attend for; None: all.
        prefills: Requests with local attention.
        shares: One per memory node.
        needs_merge: Whether a row's output has more than one part.
    """

    num_tokens: int
    remote_rows: Int64Array | None
    prefills: tuple[Prefill, ...]
    shares: tuple[NodeShare, ...]
    needs_merge: bool


def partition_step(
    batch: StepMetadata, partition: Partition, block_size: int
) -> StepPartition:
    """Divide a step between the compute node and the memory nodes.

    A row of a decoding request sees all of its request's tokens on the nodes, its own
    included. Rows of a longer chunk see the tokens that were cached before the step.
    """
    starts = batch.query_start_loc.astype(np.int64)
    query_lens = np.diff(starts)
    is_decode = query_lens == 1
    visible = np.where(is_decode, batch.seq_lens, batch.seq_lens - query_lens)
    is_remote = (query_lens > 0) & (visible > 0)
    prefills = tuple(
        Prefill(int(starts[index]), int(starts[index + 1]), bool(visible[index] > 0))
        for index in np.flatnonzero(query_lens > 1)
    )
    all_remote = bool(is_remote.all())
    lens = query_lens[is_remote]
    rows = None if all_remote else _rows_of(starts[:-1][is_remote], lens)
    visible = visible[is_remote].astype(np.int32)
    width = max(1, -(-int(visible.max(initial=1)) // block_size))
    table = batch.block_table[:, :width] if all_remote else None
    if table is None:
        table = batch.block_table[is_remote, :width]
    positions = batch.query_positions[is_remote]
    first_block = np.zeros(lens.shape[0], np.int32)
    whole = StepMetadata(
        _offsets(lens), visible, batch.slot_mapping, table, positions, first_block
    )
    if partition.kind == "heads" or partition.num_nodes == 1:
        shares = (NodeShare(whole, None, rows, None),) * partition.num_nodes
    else:
        shares = _divided_blocks(whole, rows, partition, block_size)
    needs_merge = any(prefill.has_context for prefill in prefills) or (
        partition.kind == "blocks" and partition.num_nodes > 1
    )
    return StepPartition(batch.num_tokens, rows, prefills, shares, needs_merge)


def _divided_blocks(
    whole: StepMetadata,
    rows: Int64Array | None,
    partition: Partition,
    block_size: int,
) -> tuple[NodeShare, ...]:
    """The requests, tokens and blocks that lie on each node.

    A request's last block may be partial; as the last of its node, too, it needs no
    length of its own, and attention does not ask for the order of the others.
    """
    columns = np.arange(whole.block_table.shape[1], dtype=np.int64)
    tokens = np.clip(whole.seq_lens[:, None] - columns * block_size, 0, block_size)
    used = np.where(tokens > 0, whole.block_table, 0)
    homes = np.where(tokens > 0, partition.node_of_block[used], -1)
    local_ids = partition.local_block[used]
    starts, query_lens = whole.query_start_loc[:-1], np.diff(whole.query_start_loc)
    slot_homes, local_slots = _divided_slots(whole.slot_mapping, partition, block_size)
    shares = []
    for node in range(partition.num_nodes):
        is_here = homes == node
        lens = np.where(is_here, tokens, 0).sum(1).astype(np.int32)
        has_any = lens > 0
        positions = _rows_of(starts[has_any], query_lens[has_any])
        stored_rows = np.flatnonzero(slot_homes == node)
        step = StepMetadata(
            _offsets(query_lens[has_any]),
            lens[has_any],
            local_slots[stored_rows],
            _compacted(local_ids, is_here)[has_any],
            whole.query_positions[has_any],
            whole.first_block[has_any],
        )
        query_rows = positions if rows is None else rows[positions]
        shares.append(NodeShare(step, positions, query_rows, stored_rows))
    return tuple(shares)


def _divided_slots(
    slot_mapping: Int64Array, partition: Partition, block_size: int
) -> tuple[Int32Array, Int64Array]:
    """Node of every row's slot, -1 for none, and the slot on that node."""
    blocks = slot_mapping // block_size
    homes = np.where(slot_mapping >= 0, partition.node_of_block[blocks], -1)
    local = partition.local_block[blocks].astype(np.int64)
    return homes, local * block_size + slot_mapping % block_size


def _compacted(ids: Int32Array, is_here: BoolArray) -> Int32Array:
    """Move the marked ids of every row to its front, in order."""
    counts = is_here.sum(1)
    compact = np.zeros((ids.shape[0], max(1, int(counts.max(initial=0)))), np.int32)
    place = is_here.cumsum(1) - 1
    request, _ = np.nonzero(is_here)
    compact[request, place[is_here]] = ids[is_here]
    return compact


def _offsets(lens: npt.NDArray[np.integer]) -> Int32Array:
    return np.concatenate((np.zeros(1, np.int32), lens.cumsum(dtype=np.int32)))


def _rows_of(
    begins: npt.NDArray[np.integer], lens: npt.NDArray[np.integer]
) -> Int64Array:
    """Rows ``begin .. begin + len`` of every request, one after another."""
    ends = lens.cumsum(dtype=np.int64)
    total = int(ends[-1]) if ends.size else 0
    shift = np.repeat(begins - (ends - lens), lens)
    return np.arange(total, dtype=np.int64) + shift
