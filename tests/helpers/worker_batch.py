# SPDX-License-Identifier: Apache-2.0
"""Requests as a worker has them: steps of mixed chunks and decodes, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from exact_attention import exact_attention
from paged_batch import Qkv, random_tokens
from stored_kv import stored_kv

from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata


@dataclass
class _Request:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: list[int] = field(default_factory=list)


class WorkerBatch:
    """Grows requests by random tokens, in blocks of shuffled ids.

    Args:
        geometry: The worker's layers; all get the same tokens.
        num_blocks: Blocks of the pool.
        num_reqs: Requests, all empty at first.
        free: Ids of blocks to take from the end; None: all, shuffled.
        group: KV group of the requests' blocks.
    """

    def __init__(
        self,
        geometry: SessionGeometry,
        num_blocks: int,
        num_reqs: int,
        free: list[int] | None = None,
        group: int = 0,
    ) -> None:
        self._generator = torch.Generator().manual_seed(num_reqs)
        self._geometry = geometry
        self._layer = geometry.layers[0]
        self._block_size = geometry.groups[group].block_size
        self._dtype = getattr(torch, geometry.dtype)
        shuffled = torch.randperm(num_blocks, generator=self._generator).tolist()
        self._free = shuffled if free is None else free
        self._requests = [_Request(*self._tokens(0)) for _ in range(num_reqs)]
        self._new: list[tuple[_Request, int]] = []

    def grow(self, num_new: list[int]) -> tuple[StepMetadata, Qkv]:
        """Add tokens to every request; those with 0 sit the step out.

        Returns:
            The step, and q, k, v of its tokens as views of fused rows.
        """
        self._new = [
            (request, count)
            for request, count in zip(self._requests, num_new, strict=True)
            if count
        ]
        slots = [
            slot for request, count in self._new for slot in self._add(request, count)
        ]
        widths = [len(request.blocks) for request, _ in self._new]
        table = np.full((len(widths), max(widths)), 0, np.int32)
        for row, (request, _) in zip(table, self._new, strict=True):
            row[: len(request.blocks)] = request.blocks
        counts = [count for _, count in self._new]
        step = StepMetadata.whole(
            query_start_loc=np.cumsum([0, *counts], dtype=np.int32),
            seq_lens=np.array([r.q.shape[0] for r, _ in self._new], np.int32),
            slot_mapping=np.array(slots, np.int64),
            block_table=table,
        )
        return step, self._fused_rows()

    def expected(
        self, layer: LayerGeometry | None = None, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of the last step's rows in float64, as ``layer`` attends.

        Heads beyond those of the first layer see the same queries again.
        """
        layer = layer or self._layer
        copies = layer.num_query_heads // self._layer.num_query_heads
        outs = []
        for request, count in self._new:
            num_tokens = request.q.shape[0]
            positions = torch.arange(num_tokens - count, num_tokens)
            query = request.q[-count:].repeat(1, copies, 1)
            kv = stored_kv(self._geometry, layer, request.k, request.v)
            out, lse = exact_attention(layer, query, *kv, positions)
            if sinks is not None:
                out = out * torch.sigmoid(lse - sinks.double())[..., None]
            outs.append(out)
        return torch.cat(outs)

    def reject(self, num_last: list[int]) -> None:
        """Take back the last tokens of every request, as of drafts that were wrong.

        Their blocks stay: the tokens that come next overwrite them.
        """
        for request, count in zip(self._requests, num_last, strict=True):
            if count:
                request.q, request.k, request.v = (
                    part[:-count] for part in (request.q, request.k, request.v)
                )

    def release(self, window: int) -> list[int]:
        """Give up the blocks that no later row sees, as vLLM does between steps.

        Returns:
            Their ids; tables name the null block, 0, instead.
        """
        released = []
        for request in self._requests:
            unseen = max(0, request.q.shape[0] - window + 1) // self._block_size
            for index, block in enumerate(request.blocks[:unseen]):
                if block:
                    released.append(block)
                    request.blocks[index] = 0
        return released

    def _add(self, request: _Request, count: int) -> list[int]:
        parts = zip((request.q, request.k, request.v), self._tokens(count), strict=True)
        first = request.q.shape[0]
        request.q, request.k, request.v = (torch.cat(pair) for pair in parts)
        while len(request.blocks) * self._block_size < request.q.shape[0]:
            request.blocks.append(self._free.pop())
        size = self._block_size
        return [
            request.blocks[position // size] * size + position % size
            for position in range(first, first + count)
        ]

    def _fused_rows(self) -> Qkv:
        parts = [
            torch.cat([getattr(request, name)[-count:] for request, count in self._new])
            for name in "qkv"
        ]
        rows = torch.cat([part.flatten(1) for part in parts], dim=1)
        widths = [part[0].numel() for part in parts]
        q, k, v = (
            piece.view(part.shape)
            for piece, part in zip(rows.split(widths, dim=1), parts, strict=True)
        )
        return q, k, v

    def _tokens(self, count: int) -> Qkv:
        return random_tokens(self._layer, count, self._dtype, self._generator)
