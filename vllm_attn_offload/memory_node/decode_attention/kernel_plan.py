# SPDX-License-Identifier: Apache-2.0
"""Plans of the Triton kernels, whose memory is kept from step to step."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.step import Int32Array, StepMetadata
from vllm_attn_offload.triton_kernels import DecodeAttentionPlan, plan_decode_attention

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
}
#: The kernels are made for this many query rows per request; prefill chunks are cut.
MAX_QUERY_LEN = 16
#: Query rows x heads x tokens of one launch, about: milliseconds of a GPU. A longer
#: layer takes several launches, each planned for itself.
MAX_SCORES = 1 << 29


@dataclass(frozen=True, slots=True)
class HeadShape:
    """A layer's heads and window; layers of a group with the same ones share a plan."""

    num_query_heads: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    sliding_window: int

    @classmethod
    def of(cls, layer: LayerGeometry) -> HeadShape:
        """Heads and window of a layer."""
        return cls(
            layer.num_query_heads,
            layer.num_kv_heads,
            layer.head_size,
            layer.v_head_size,
            layer.sliding_window,
        )


class KernelPlan:
    """Steps of one micro-batch and KV cache group, planned one after another.

    Keeps its memory from step to step. Steps of other micro-batches and sessions lie
    between the layers of this one's, so each has a plan of its own.

    Args:
        group: Index of the KV cache group.
        geometry: Geometry of the session.
        device: Where the kernels run.
        max_scores: Query rows x heads x tokens of a launch.

    Attributes:
        num_tokens: Rows of k and v in every layer.
        num_query_rows: Rows of q in every layer.
        num_parts: Launches of a layer.
        num_done: Those of an unfinished layer that were made.
        slot_mapping: ``[num_tokens]`` int64 on the device.
        block_table: ``[pieces, width]`` int32 on the device, of one part.
        block_positions: Alike: of each block's first token; None where they follow.
        by_shape: Filled plans of the kernels, for one part.
    """

    def __init__(
        self,
        group: int,
        geometry: SessionGeometry,
        device: torch.device,
        max_scores: int = MAX_SCORES,
    ) -> None:
        self._max_scores = max_scores
        self._dtype = TORCH_DTYPES[geometry.dtype]
        self._block_dtype = TORCH_DTYPES[geometry.block_dtype]
        self._block_size = geometry.groups[group].block_size
        self._device = device
        self._shapes = {
            HeadShape.of(layer) for layer in geometry.layers if layer.group == group
        }
        self._slots = _StepTable(torch.int64, device)
        self._table = _StepTable(torch.int32, device)
        self._positions = _StepTable(torch.int32, device)
        self.block_positions: torch.Tensor | None = None
        # Every length of queries is a variant of the kernels, with a tile of its own.
        self._kept: dict[tuple[HeadShape, int], DecodeAttentionPlan] = {}
        self.by_shape: dict[HeadShape, DecodeAttentionPlan] = {}

    def fill(self, step: StepMetadata) -> None:
        """Plan a step, whose arrays may change afterwards."""
        owner, starts, positions = cut_queries(step)
        self.num_tokens = step.num_tokens
        self.num_query_rows = step.num_query_rows
        self.slot_mapping = self._slots.write(step.slot_mapping)
        num_heads = max(shape.num_query_heads for shape in self._shapes)
        num_held = step.tokens_held(self._block_size)[owner]
        bounds = _cut_pieces(np.diff(starts) * num_heads, num_held, self._max_scores)
        self.num_parts, self.num_done = len(bounds) - 1, 0
        self._starts, self._query_positions, self._bounds = starts, positions, bounds
        self._owner = owner
        # A step of one part is planned now, and not for each of its layers.
        self._step = copy.deepcopy(step) if self.num_parts > 1 else step
        self.fill_part()

    def fill_part(self) -> slice:
        """Plan the part that is next; returns its query rows."""
        first, last = self._bounds[self.num_done : self.num_done + 2]
        begin, end = int(self._starts[first]), int(self._starts[last])
        starts = self._starts[first : last + 1] - begin
        longest = round_up(int(np.diff(starts).max(initial=1)))
        step, owner = self._step, self._owner[first:last]
        positions = self._query_positions[first:last]
        self.block_table = self._table.write(step.block_table[owner])
        self.block_positions, indices = None, None
        if step.block_indices is not None:
            indices = step.block_indices[owner]
            self.block_positions = self._positions.write(indices * self._block_size)
        for shape in self._shapes:
            self.by_shape[shape] = plan_decode_attention(
                self._plan_of(shape, longest, last - first),
                torch.from_numpy(starts),
                torch.from_numpy(step.seq_lens[owner]),
                query_positions=torch.from_numpy(positions),
                **self._columns(shape, step.first_block[owner], indices, positions),
            )
        return slice(begin, end)

    def _columns(
        self,
        shape: HeadShape,
        first_block: Int32Array,
        indices: Int32Array | None,
        positions: Int32Array,
    ) -> dict[str, torch.Tensor]:
        """Columns of the table that pieces attend to, as the kernels' plan takes them.

        Args:
            shape: Kind of layers.
            first_block: ``[pieces]``.
            indices: ``[pieces, width]``; None: blocks follow the first one.
            positions: ``[pieces]``, of first rows.
        """
        if indices is None:
            return {"first_block": torch.from_numpy(first_block)}
        oldest = np.zeros_like(positions)
        if shape.sliding_window:
            oldest = np.maximum(positions - shape.sliding_window + 1, 0)
        is_hidden = (indices >= 0) & (indices < oldest[:, None] // self._block_size)
        return {
            "num_blocks": torch.from_numpy((indices >= 0).sum(1, dtype=np.int32)),
            "first_column": torch.from_numpy(is_hidden.sum(1, dtype=np.int32)),
        }

    def _plan_of(
        self, shape: HeadShape, longest: int, num_pieces: int
    ) -> DecodeAttentionPlan:
        """The kept plan, or a larger one where the pieces do not fit."""
        plan = self._kept.get((shape, longest))
        if plan is None or plan.max_num_seqs < num_pieces:
            plan = self._kept[shape, longest] = DecodeAttentionPlan(
                max_num_seqs=round_up(num_pieces),
                max_query_len=longest,
                num_query_heads=shape.num_query_heads,
                num_kv_heads=shape.num_kv_heads,
                head_size=shape.head_size,
                v_head_size=shape.v_head_size,
                block_size=self._block_size,
                sliding_window=shape.sliding_window or None,
                query_dtype=self._dtype,
                kv_cache_dtype=self._block_dtype,
                device=self._device,
            )
        return plan


class _StepTable:
    """An integer array of each step on the device; its memory grows and is kept.

    Args:
        dtype: Type of its elements.
        device: Where the kernels run.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._staging = torch.empty(0, dtype=dtype)
        self._values = torch.empty(0, dtype=dtype, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def write(self, array: np.ndarray) -> torch.Tensor:
        """Copy ``array`` to the device on the current stream.

        Returns:
            Tensor of the array's shape, valid until the next write.
        """
        if self._copied is not None:
            self._copied.synchronize()
        source, size = torch.from_numpy(array), array.size
        if self._values.numel() < size:
            room = round_up(size)
            self._values = self._values.new_empty(room)
            if self._copied is not None:
                self._staging = torch.empty(room, dtype=source.dtype, pin_memory=True)
        values = self._values[:size].view(array.shape)
        if self._copied is None:
            return values.copy_(source)
        staging = self._staging[:size].view(array.shape).copy_(source)
        values.copy_(staging, non_blocking=True)
        self._copied.record()
        return values


def round_up(number: int) -> int:
    """The next power of two; at least 1."""
    return 1 << (max(number, 1) - 1).bit_length()


def cut_queries(
    step: StepMetadata,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut requests into pieces of at most ``MAX_QUERY_LEN`` rows.

    Returns:
        For each piece its request, int64; ``[pieces + 1]`` int32 first rows; and the
        int32 position of its first one.
    """
    pieces = [
        (index, begin, begin_of, min(begin + MAX_QUERY_LEN, end))
        for index, (begin_of, end) in enumerate(_bounds(step))
        for begin in range(begin_of, end, MAX_QUERY_LEN)
    ]
    owner, begins, of_request, ends = np.array(pieces, np.int64).reshape(-1, 4).T
    starts = np.concatenate((np.zeros(1, np.int32), ends.astype(np.int32)))
    positions = step.query_positions[owner] + (begins - of_request)
    return owner, starts, positions.astype(np.int32)


def _cut_pieces(rows: np.ndarray, num_held: np.ndarray, max_scores: int) -> list[int]:
    """Cut pieces into parts of about so many scores, and of one piece at least.

    Args:
        rows: int32 ``[pieces]``: query rows times heads.
        num_held: int64 ``[pieces]``: tokens in the blocks of each.
        max_scores: Of a part.

    Returns:
        First piece of every part, and the number of pieces.
    """
    scores = rows.astype(np.int64) * num_held
    part_of = (scores.cumsum() - scores) // max_scores
    cuts = np.flatnonzero(np.diff(part_of)) + 1
    return [0, *cuts.tolist(), len(rows)]


def _bounds(step: StepMetadata) -> Iterable[tuple[int, int]]:
    rows = step.query_start_loc.tolist()
    return zip(rows, rows[1:], strict=False)
