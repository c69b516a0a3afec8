# SPDX-License-Identifier: Apache-2.0
"""Requests of a step, cut into what torch attends to at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from vllm_attn_offload.protocol.geometry import LayerGeometry
from vllm_attn_offload.protocol.step import StepMetadata

#: Tokens, and query rows x heads x tokens, that are attended at once, in a few ms. More
#: rows than that have the tokens gathered again, for a quarter of the time.
_MAX_TOKENS = 2048
_MAX_SCORES = 1 << 18


@dataclass(frozen=True, slots=True)
class StepRequest:
    """Query rows of a request, and its blocks.

    ``position`` is that of the first row, ``blocks`` int64 ``[num_blocks]``, and
    ``indices`` int32 alike: which of the request's blocks they are.
    """

    begin: int
    end: int
    position: int
    seq_len: int
    blocks: torch.Tensor
    indices: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RequestPart:
    """Query rows of a request, and blocks that they attend to at once.

    Tokens ``seen`` are those that some of the rows see. With ``is_last`` no block is
    left for the rows.
    """

    begin: int
    end: int
    position: int
    seen: tuple[int, int]
    blocks: torch.Tensor
    indices: npt.NDArray[np.int32]
    is_last: bool

    def tokens(self, block_size: int) -> tuple[torch.Tensor, slice]:
        """Positions of the tokens that are read, and where they lie in the blocks.

        Not kept in the plan: they take 8 bytes a token. Only the first and the last
        block have tokens that no row sees, because those between lie between seen ones.
        """
        first = torch.from_numpy(self.indices.astype(int))[:, None] * block_size
        positions = (first + torch.arange(block_size)).flatten()
        low, high = self.seen
        begin = max(0, low - int(positions[0]))
        end = len(positions) - max(0, int(positions[-1]) + 1 - high)
        return positions[begin:end], slice(begin, end)


def requests_of(step: StepMetadata, block_size: int) -> tuple[StepRequest, ...]:
    """Requests of a step, whose arrays may change afterwards."""
    requests = []
    starts, columns = step.query_start_loc.tolist(), step.num_columns(block_size)
    for index, (begin, end) in enumerate(pairwise(starts)):
        count = int(columns[index]) if begin < end else 0
        if step.block_indices is None:
            first = int(step.first_block[index])
            indices = np.arange(first, first + count, dtype=np.int32)
        else:
            indices = step.block_indices[index, :count].copy()
        requests.append(
            StepRequest(
                begin=begin,
                end=end,
                position=int(step.query_positions[index]),
                seq_len=int(step.seq_lens[index]),
                blocks=torch.from_numpy(step.block_table[index, :count].astype(int)),
                indices=indices,
            )
        )
    return tuple(requests)


def parts_of(
    requests: tuple[StepRequest, ...], layer: LayerGeometry, block_size: int
) -> Iterator[RequestPart]:
    """Cut requests between rows, and rows of long ones between blocks."""
    window = layer.sliding_window
    most_blocks = max(1, _MAX_TOKENS // block_size)
    for request in requests:
        most_tokens = min(len(request.blocks), most_blocks) * block_size
        if window:
            num_seen = window + request.end - request.begin
            most_tokens = min(most_tokens, num_seen)
        num_scores = max(1, most_tokens) * layer.num_query_heads
        num_rows = max(1, _MAX_SCORES // num_scores)
        for begin in range(request.begin, request.end, num_rows):
            end = min(request.end, begin + num_rows)
            position = request.position + begin - request.begin
            low = max(0, position - window + 1) if window else 0
            high = min(request.seq_len, position + end - begin)
            first = bisect_left(request.indices, low // block_size)
            last = first
            if high > low:
                last = bisect_left(request.indices, -(-high // block_size))
            for block in range(first, max(last, first + 1), most_blocks):
                blocks = slice(block, min(last, block + most_blocks))
                yield RequestPart(
                    begin=begin,
                    end=end,
                    position=position,
                    seen=(low, high),
                    blocks=request.blocks[blocks],
                    indices=request.indices[blocks],
                    is_last=block + most_blocks >= last,
                )
