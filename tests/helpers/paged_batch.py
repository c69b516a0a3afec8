# SPDX-License-Identifier: Apache-2.0
"""Requests with their tokens and blocks: steps to send, and what must come back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

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
    """All rows so far: q ``[n, heads, d]``, k and v ``[n, kv_heads, d]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.q.shape[0]


class PagedBatch:
    """Grows requests by random tokens, in blocks of shuffled ids.

    Args:
        geometry: Session; all of its layers get the same tokens.
        num_blocks: Blocks of the session's pool.
        num_reqs: Requests of the batch, all empty at first.
        seed: Of tokens and of the order of blocks.
    """

    def __init__(
        self, geometry: SessionGeometry, num_blocks: int, num_reqs: int, seed: int = 0
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._layer = geometry.layers[0]
        self._block_size = geometry.groups[0].block_size
        self._dtype = TORCH_DTYPES[geometry.dtype]
        self._free = torch.randperm(num_blocks, generator=self._generator).tolist()
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
            request.q, request.k, request.v = (
                torch.cat((old, new))
                for old, new in zip(
                    (request.q, request.k, request.v), parts, strict=True
                )
            )
            while len(request.blocks) * self._block_size < request.num_tokens:
                request.blocks.append(self._free.pop())
            rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
            slots += [
                request.blocks[p // self._block_size] * self._block_size
                + p % self._block_size
                for p in range(first, request.num_tokens)
            ]
        return self._step(slots), torch.cat(rows)

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the last step's rows to all tokens, computed in ``dtype``.

        Returns:
            ``[num_tokens, heads, d]`` and log-sum-exp ``[num_tokens, heads]``.
        """
        results = [self._attend(request, n, dtype) for request, n in self._new]
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def _tokens(self, count: int) -> Qkv:
        return random_tokens(self._layer, count, self._dtype, self._generator)

    def _step(self, slots: list[int]) -> StepMetadata:
        requests = [request for request, _ in self._new]
        width = max(len(request.blocks) for request in requests)
        # StridedRows past a request's blocks are never looked at: vLLM leaves old ids.
        table = np.full((len(requests), width), -12345, np.int32)
        for row, request in zip(table, requests, strict=True):
            row[: len(request.blocks)] = request.blocks
        counts = [count for _, count in self._new]
        return StepMetadata.whole(
            query_start_loc=np.cumsum([0, *counts], dtype=np.int32),
            seq_lens=np.array([r.num_tokens for r in requests], np.int32),
            slot_mapping=np.array(slots, np.int64),
            block_table=table,
        )

    def _attend(
        self, request: _Request, num_new: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = self._layer.num_query_heads // self._layer.num_kv_heads
        q = request.q[-num_new:].to(dtype)
        k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (request.k, request.v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self._layer.softmax_scale
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return out, scores.logsumexp(-1).T


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
