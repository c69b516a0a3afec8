# SPDX-License-Identifier: Apache-2.0
"""Requests with their tokens and blocks: steps to send, and what must come back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from exact_attention import exact_attention
from stored_kv import stored_kv

from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class _Request:
    """All rows so far: q ``[n, heads, d]``, k and v ``[n, kv_heads, d]``.

    ``blocks`` begin with the ``first``-th; those before were given back.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: list[int] = field(default_factory=list)
    first: int = 0

    @property
    def num_tokens(self) -> int:
        return self.q.shape[0]


class PagedBatch:
    """Grows requests by random tokens, in blocks of shuffled ids.

    Args:
        geometry: Session; all layers of a group get the same tokens.
        num_blocks: Blocks of the session's pool.
        num_reqs: Requests of the batch, all empty at first.
        seed: Of tokens and of the order of blocks.
        group: KV group whose blocks these are.
        window: Blocks that it does not show are given back, as vLLM does; 0: none.
        blocks: Ids to take blocks from; None: all of the pool's.

    Attributes:
        freed: Blocks that were given back; they are taken no more.
    """

    def __init__(
        self,
        geometry: SessionGeometry,
        num_blocks: int,
        num_reqs: int,
        seed: int = 0,
        *,
        group: int = 0,
        window: int = 0,
        blocks: list[int] | None = None,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._geometry = geometry
        self._layer = next(x for x in geometry.layers if x.group == group)
        self._window = window
        self.freed: list[int] = []
        self._block_size = geometry.groups[group].block_size
        self._dtype = TORCH_DTYPES[geometry.dtype]
        order = torch.randperm(num_blocks, generator=self._generator).tolist()
        self._free = order if blocks is None else [b for b in order if b in blocks]
        self._requests = [_Request(*self._tokens(0)) for _ in range(num_reqs)]
        self._new: list[tuple[_Request, int]] = []

    def poison(self, num_blocks: int) -> tuple[StepMetadata, torch.Tensor]:
        """A step that stores NaN in every slot of the pool."""
        num_tokens = num_blocks * self._block_size
        step = StepMetadata.whole(
            query_start_loc=np.arange(num_blocks + 1, dtype=np.int32)
            * self._block_size,
            seq_lens=np.full(num_blocks, self._block_size, np.int32),
            slot_mapping=np.arange(num_tokens, dtype=np.int64),
            block_table=np.arange(num_blocks, dtype=np.int32)[:, None],
        )
        width = sum(part.flatten(1).shape[1] for part in self._tokens(1))
        return step, torch.full((num_tokens, width), torch.nan, dtype=self._dtype)

    def poison_freed(self) -> tuple[StepMetadata, torch.Tensor, torch.Tensor]:
        """A step that stores NaN in all blocks that were given back; k and v of it."""
        size = self._block_size
        slots = [b * size + offset for b in self.freed for offset in range(size)]
        none = np.zeros(0, np.int32)
        step = StepMetadata.whole(
            query_start_loc=np.zeros(1, np.int32),
            seq_lens=none,
            slot_mapping=np.array(slots, np.int64),
            block_table=none[:, None],
        )
        _, key, value = self._tokens(len(slots))
        return step, key.fill_(torch.nan), value.fill_(torch.nan)

    def grow(self, num_new: list[int]) -> tuple[StepMetadata, torch.Tensor]:
        """Add tokens to every request; those with 0 sit the step out.

        Returns:
            The step, and ``[num_tokens, q + k + v]`` of the new tokens.
        """
        self._new = [
            (request, count)
            for request, count in zip(self._requests, num_new, strict=True)
            if count
        ]
        rows, slots = [], []
        for request, count in self._new:
            parts = self._tokens(count)
            first = request.num_tokens
            self._give_back(request)
            request.q, request.k, request.v = (
                torch.cat((old, new))
                for old, new in zip(
                    (request.q, request.k, request.v), parts, strict=True
                )
            )
            needed = -(-request.num_tokens // self._block_size) - request.first
            while len(request.blocks) < needed:
                request.blocks.append(self._free.pop())
            rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
            slots += [
                request.blocks[p // self._block_size - request.first] * self._block_size
                + p % self._block_size
                for p in range(first, request.num_tokens)
            ]
        return self._step(slots), torch.cat(rows)

    def expected(
        self, dtype: torch.dtype, layer: LayerGeometry | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the last step's rows to what they see, computed in ``dtype``.

        Args:
            dtype: Of all operations.
            layer: Whose window, cap and slopes count; None: the group's first.

        Returns:
            ``[num_tokens, heads, d]`` and log-sum-exp ``[num_tokens, heads]``.
        """
        layer = layer or self._layer
        results = [
            exact_attention(
                layer,
                request.q[-n:],
                *stored_kv(self._geometry, layer, request.k, request.v),
                torch.arange(request.num_tokens - n, request.num_tokens),
                dtype=dtype,
            )
            for request, n in self._new
        ]
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def _tokens(self, count: int) -> Qkv:
        return random_tokens(self._layer, count, self._dtype, self._generator)

    def _step(self, slots: list[int]) -> StepMetadata:
        requests = [request for request, _ in self._new]
        width = max(len(request.blocks) for request in requests)
        # Columns past a request's blocks are never looked at: vLLM leaves old ids.
        table = np.full((len(requests), width), -12345, np.int32)
        for row, request in zip(table, requests, strict=True):
            row[: len(request.blocks)] = request.blocks
        counts = [count for _, count in self._new]
        step = StepMetadata.whole(
            query_start_loc=np.cumsum([0, *counts], dtype=np.int32),
            seq_lens=np.array([r.num_tokens for r in requests], np.int32),
            slot_mapping=np.array(slots, np.int64),
            block_table=table,
        )
        first_block = np.array([request.first for request in requests], np.int32)
        return replace(step, first_block=first_block)

    def _give_back(self, request: _Request) -> None:
        """Drop the blocks that the next row does not see, nor any after it."""
        oldest = request.num_tokens - self._window + 1
        if self._window and oldest > 0:
            first = oldest // self._block_size
            self.freed += request.blocks[: first - request.first]
            del request.blocks[: first - request.first]
            request.first = first


def random_tokens(
    layer: LayerGeometry, count: int, dtype: torch.dtype, generator: torch.Generator
) -> Qkv:
    """q ``[count, heads, d]``, k and v ``[count, kv_heads, d]`` of new tokens."""
    shapes = (
        (count, layer.num_query_heads, layer.head_size),
        (count, layer.num_kv_heads, layer.head_size),
        (count, layer.num_kv_heads, layer.v_head_size),
    )
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def max_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference from the float64 reference."""
    return float((found.double() - exact).abs().max())
