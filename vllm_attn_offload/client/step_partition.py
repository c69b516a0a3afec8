# SPDX-License-Identifier: Apache-2.0
"""Divides a scheduler step between the memory nodes and the compute node.

Prefill is compute-bound and stays: only rows whose keys lie on the nodes are sent there
(Lamina, arXiv 2405.01814, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vllm_attn_offload.client.partition import Partition
from vllm_attn_offload.protocol.step import Int32Array, Int64Array, StepMetadata

BoolArray = npt.NDArray[np.bool_]

#: Rows of a request that kernels of memory nodes attend for together.
MAX_DECODE_ROWS = 16


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
    with ``has_context`` some attend to cached tokens on the nodes, too."""

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
    batch: StepMetadata,
    partition: Partition,
    block_size: int,
    window: int = 0,
    decode_threshold: int = 1,
) -> StepPartition:
    """Divide a step between the compute node and the memory nodes.

    Rows of a decoding request, several where drafts are verified, see their request's
    tokens on the nodes up to their own, which is stored first. Rows of a longer chunk
    see there the tokens that were cached before the step.

    Args:
        batch: The step of one KV group.
        partition: Division of the blocks, or of the heads.
        block_size: Tokens of a block.
        window: Most tokens that a row sees in any layer of the group, its own
            included; 0: all. Rows and blocks that it hides are not sent.
        decode_threshold: Most rows of a request that decodes, at least 1.
    """
    starts = batch.query_start_loc.astype(np.int64)
    query_lens = starts[1:] - starts[:-1]
    is_decode = (query_lens > 0) & (query_lens <= decode_threshold)
    if decode_threshold > 1 and (batch.slot_mapping < 0).any():
        batch = replace(batch, seq_lens=_stored_lens(batch, starts))
    if is_decode.all():
        whole = _decode_step(batch, query_lens, block_size, window)
        return _between_nodes(batch, whole, None, (), partition, block_size)
    visible = np.where(is_decode, batch.seq_lens, batch.query_positions)
    remote_lens = _remote_lens(query_lens, is_decode, visible, window)
    is_remote = remote_lens > 0
    prefills = tuple(
        Prefill(int(starts[index]), int(starts[index + 1]), bool(is_remote[index]))
        for index in np.flatnonzero(query_lens > decode_threshold)
    )
    lens = remote_lens[is_remote]
    rows = None
    if not (remote_lens == query_lens).all():
        rows = _rows_of(starts[:-1][is_remote], lens)
    whole = _remote_step(batch, is_remote, lens, visible[is_remote], block_size, window)
    return _between_nodes(batch, whole, rows, prefills, partition, block_size)


def _between_nodes(
    batch: StepMetadata,
    whole: StepMetadata,
    rows: Int64Array | None,
    prefills: tuple[Prefill, ...],
    partition: Partition,
    block_size: int,
) -> StepPartition:
    """Give every node its share of the step of all nodes together."""
    if partition.kind == "heads" or partition.num_nodes == 1:
        shares = (NodeShare(whole, None, rows, None),) * partition.num_nodes
    else:
        shares = _divided_blocks(whole, rows, partition, block_size)
    needs_merge = any(prefill.has_context for prefill in prefills) or (
        partition.kind == "blocks" and partition.num_nodes > 1
    )
    return StepPartition(batch.num_tokens, rows, prefills, shares, needs_merge)


def _stored_lens(batch: StepMetadata, starts: Int64Array) -> Int32Array:
    """Each request's tokens up to the last row that is stored.

    A drafter pads requests by rows of rejected tokens, which get no slot: what lies
    there was never written, and no row whose output is used sees it.
    """
    rows = np.flatnonzero(batch.slot_mapping >= 0)
    request = np.searchsorted(starts, rows, side="right") - 1
    num_stored = np.zeros(batch.num_reqs, np.int64)
    np.maximum.at(num_stored, request, rows - starts[request] + 1)
    lens = np.where(num_stored, batch.query_positions + num_stored, batch.seq_lens)
    return lens.astype(np.int32)


def _remote_lens(
    query_lens: Int64Array, is_decode: BoolArray, visible: Int64Array, window: int
) -> Int64Array:
    """Rows of each request that see tokens on the nodes: its first ones."""
    lens = np.where(visible > 0, query_lens, 0)
    if window:
        # A chunk's row i sees cached tokens only while i < window - 1.
        lens = np.where(is_decode, lens, np.minimum(lens, window - 1))
    return lens


def _decode_step(
    batch: StepMetadata, query_lens: Int64Array, block_size: int, window: int
) -> StepMetadata:
    """The step of all nodes where every request decodes."""
    if window:
        all_of_them, visible = np.ones(batch.num_reqs, np.bool_), batch.seq_lens
        return _remote_step(batch, all_of_them, query_lens, visible, block_size, window)
    width = max(1, -(-int(batch.seq_lens.max(initial=1)) // block_size))
    if width == batch.block_table.shape[1]:
        return batch
    return replace(batch, block_table=batch.block_table[:, :width])


def _remote_step(
    batch: StepMetadata,
    is_remote: BoolArray,
    lens: Int64Array,
    visible: npt.NDArray[np.integer],
    block_size: int,
    window: int,
) -> StepMetadata:
    """The step of all nodes together, with the blocks that its rows may see."""
    positions = batch.query_positions[is_remote]
    first_block = np.zeros_like(positions)
    if window:
        first_block = np.maximum(positions - window + 1, 0) // block_size
    columns = -(-visible // block_size) - first_block
    width = max(1, int(columns.max(initial=1)))
    table = batch.block_table
    if first_block.any():
        index = first_block[:, None] + np.arange(width)
        index = np.minimum(index, table.shape[1] - 1)
        table = np.take_along_axis(table[is_remote], index, axis=1)
    else:
        table = table[:, :width] if is_remote.all() else table[is_remote, :width]
    return StepMetadata(
        _offsets(lens),
        visible.astype(np.int32),
        batch.slot_mapping,
        table,
        positions,
        first_block,
    )


def _divided_blocks(
    whole: StepMetadata,
    rows: Int64Array | None,
    partition: Partition,
    block_size: int,
) -> tuple[NodeShare, ...]:
    """The requests, tokens and blocks that lie on each node."""
    columns = np.arange(whole.block_table.shape[1], dtype=np.int32)
    indices = whole.first_block[:, None] + columns
    is_used = indices < -(-whole.seq_lens // block_size)[:, None]
    used = np.where(is_used, whole.block_table, 0)
    homes = np.where(is_used, partition.node_of_block[used], -1)
    local_ids = partition.local_block[used]
    starts, query_lens = whole.query_start_loc[:-1], np.diff(whole.query_start_loc)
    slot_homes, local_slots = _divided_slots(whole.slot_mapping, partition, block_size)
    shares = []
    for node in range(partition.num_nodes):
        is_here = homes == node
        has_any = is_here.any(1)
        positions = _rows_of(starts[has_any], query_lens[has_any])
        stored_rows = np.flatnonzero(slot_homes == node)
        step = StepMetadata(
            _offsets(query_lens[has_any]),
            whole.seq_lens[has_any],
            local_slots[stored_rows],
            _compacted(local_ids, is_here, 0)[has_any],
            whole.query_positions[has_any],
            np.zeros(int(has_any.sum()), np.int32),
            _compacted(indices, is_here, -1)[has_any],
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


def _compacted(values: Int32Array, is_here: BoolArray, empty: int) -> Int32Array:
    """Move the marked values of every row to its front, in order."""
    counts = is_here.sum(1)
    width = max(1, int(counts.max(initial=0)))
    compact = np.full((values.shape[0], width), empty, np.int32)
    place = is_here.cumsum(1) - 1
    request, _ = np.nonzero(is_here)
    compact[request, place[is_here]] = values[is_here]
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
