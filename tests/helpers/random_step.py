# SPDX-License-Identifier: Apache-2.0
"""Random steps of a layer with windows, caps and slopes, for any kernel of a node."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from exact_attention import exact_attention
from paged_batch import TORCH_DTYPES
from raw_session import as_bytes, encode_step
from stored_kv import stored_kv, with_fp8

from vllm_attn_offload.memory_node.decode_attention.base import (
    DecodeAttention,
    LayerCall,
)
from vllm_attn_offload.memory_node.kv_cache import PagedKVCache
from vllm_attn_offload.protocol.geometry import (
    Dtype,
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)
from vllm_attn_offload.protocol.layer import DTYPE_BYTES, PayloadLayout, TokenLayout
from vllm_attn_offload.protocol.step import StepLimits, StepMetadata
from vllm_attn_offload.protocol.step_reader import read_step

#: Never stored into, and named by whatever no row sees: vLLM's null block.
NULL_BLOCK = 0


@dataclass
class _Request:
    """Its tokens, and the blocks of them that the node holds, by index."""

    seq_len: int
    position: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    held: list[int]


class RandomStep:
    """One step of a layer that random choices make; everything unseen is NaN.

    Args:
        seed: Of all choices.
        head_sizes: Sizes of K to choose from.
        dtype: Of the session.
        max_tokens: Longest request.
        is_fp8: Of the blocks.
    """

    def __init__(
        self,
        seed: int,
        head_sizes: Sequence[int] = (16, 64, 80),
        dtype: Dtype = "float32",
        max_tokens: int = 200,
        *,
        is_fp8: bool = False,
    ) -> None:
        self._choose = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = TORCH_DTYPES[dtype]
        self._max_tokens = max_tokens
        self._block_size = self._choose.choice([4, 16, 24, 64])
        geometry = SessionGeometry(
            dtype, [KVGroup(self._block_size)], [self._draw_layer(head_sizes)]
        )
        self._geometry = with_fp8(geometry) if is_fp8 else geometry
        (self.layer,) = self._geometry.layers
        self._share = self._choose.choice([None, None, (0, 2), (1, 3)])
        self._requests = [self._draw_request() for _ in range(3)]
        self.step, self._stored = self._draw_step()

    def assert_exact(self, attention: DecodeAttention[Any, Any]) -> None:
        """Attend with a kernel; compare with float64."""
        cache = PagedKVCache(self._geometry, self._num_blocks, attention)
        with closing(cache):
            attention.poison(cache.region(self.layer))
            out, lse = self._run(attention, cache)
        exact, exact_lse = self._expected()
        eps = torch.finfo(self._dtype).eps
        loss = max(2e-5, eps)
        torch.testing.assert_close(out.double(), exact, atol=loss, rtol=loss)
        torch.testing.assert_close(lse.double(), exact_lse, atol=3e-5, rtol=1e-6)

    def _draw_layer(self, head_sizes: Sequence[int]) -> LayerGeometry:
        num_kv_heads, group = self._choose.choice([(1, 1), (2, 2), (1, 8), (3, 3)])
        num_heads, size = num_kv_heads * group, self._choose.choice(head_sizes)
        slopes = self._normal(num_heads).abs() / 16
        has_slopes = self._choose.random() < 0.4
        return LayerGeometry(
            name="layer",
            group=0,
            storage=0,
            num_query_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=size,
            v_head_size=self._choose.choice([size, 64]),
            softmax_scale=size**-0.5,
            sliding_window=self._choose.choice([0, 1, 7, 16, 33, 100, (1 << 31) - 1]),
            soft_cap=self._choose.choice([0.0, 0.0, 2.0, 30.0]),
            alibi_slopes=tuple(slopes.tolist()) if has_slopes else (),
        )

    def _draw_request(self) -> _Request:
        """Rows among the tokens, behind them, far behind them, or few of either."""
        choose = self._choose
        seq_len = choose.choice([0, 1, self._block_size, choose.randint(1, 200)])
        seq_len = min(seq_len, self._max_tokens)
        num_rows = choose.choice([0, 1, 1, 2, 17, 40])
        position = choose.choice(
            [
                max(0, seq_len - num_rows),
                seq_len,
                choose.randint(0, seq_len),
                seq_len + choose.randint(0, 40),
                seq_len + 300,
            ]
        )
        layer, num_blocks = self.layer, -(-seq_len // self._block_size)
        held = list(range(num_blocks))
        if self._share:
            held = held[self._share[0] :: self._share[1]]
        return _Request(
            seq_len=seq_len,
            position=position,
            query=self._normal(num_rows, layer.num_query_heads, layer.head_size),
            key=self._normal(seq_len, layer.num_kv_heads, layer.head_size),
            value=self._normal(seq_len, layer.num_kv_heads, layer.v_head_size),
            held=held,
        )

    def _draw_step(self) -> tuple[StepMetadata, list[tuple[int, _Request, int]]]:
        """The step, and slot, request and position of every token that a row sees."""
        rows, indices, stored = [], [], []
        self._num_blocks = 1 + sum(len(request.held) for request in self._requests)
        free = list(range(1, self._num_blocks))
        self._choose.shuffle(free)
        first_block = []
        for request in self._requests:
            low, high = self._seen(request)
            # A table may begin with any block up to the first that is seen.
            most = min(max(low, 0) // self._block_size, len(request.held))
            first = 0 if self._share else self._choose.randint(0, most)
            first_block.append(first)
            row = []
            for index in request.held[first:]:
                begin = index * self._block_size
                seen = range(max(low, begin), min(high, begin + self._block_size))
                row.append(free.pop() if seen else NULL_BLOCK)
                slot = row[-1] * self._block_size - begin
                stored += [(slot + at, request, at) for at in seen]
            rows.append(row)
            indices.append(request.held[first:])
        table = _padded(rows, NULL_BLOCK)
        step = StepMetadata(
            query_start_loc=np.cumsum(
                [0, *(len(r.query) for r in self._requests)], dtype=np.int32
            ),
            seq_lens=np.array([r.seq_len for r in self._requests], np.int32),
            slot_mapping=np.zeros(0, np.int64),
            block_table=table,
            query_positions=np.array([r.position for r in self._requests], np.int32),
            first_block=np.array(first_block, np.int32),
            block_indices=_padded(indices, -1) if self._share else None,
        )
        return step, stored

    def _seen(self, request: _Request) -> tuple[int, int]:
        """Positions that some row sees."""
        window = self.layer.sliding_window
        if not len(request.query):
            return request.seq_len, request.seq_len
        low = request.position - window + 1 if window else 0
        return low, min(request.seq_len, request.position + len(request.query))

    def _run(
        self, attention: DecodeAttention[Any, Any], cache: PagedKVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer, stride = self.layer, cache.block_stride(self.layer)
        pool = attention.bind(self._geometry, layer, cache.region(layer), stride)
        self._store(attention, pool)
        plan = attention.plan(0, self._geometry, self._checked(), None)
        query = torch.cat([request.query for request in self._requests])
        out = torch.full((*query.shape[:2], layer.v_head_size), torch.nan)
        out = out.to(self._dtype)
        lse = torch.full(query.shape[:2], torch.nan)
        if not len(query):
            return out, lse
        layout = self._layout(len(query), 0)
        call = LayerCall(as_bytes(query), layout, as_bytes(out), as_bytes(lse))
        while not attention.attend(pool, plan, call):
            continue
        return out, lse

    def _checked(self) -> StepMetadata:
        """The step as a node reads it from a frame."""
        width = self.step.block_table.shape[1]
        limits = StepLimits(self._num_blocks, self._block_size, 1000, 3, width)
        return read_step(encode_step(self.step), limits)

    def _store(self, attention: DecodeAttention[Any, Any], pool: Any) -> None:
        if not self._stored:
            return
        none = np.zeros(0, np.int32)
        slots = np.array([slot for slot, _, _ in self._stored], np.int64)
        step = StepMetadata.whole(np.zeros(1, np.int32), none, slots, none[:, None])
        parts = [
            torch.stack([getattr(request, name)[at] for _, request, at in self._stored])
            for name in ("key", "value")
        ]
        payload = as_bytes(torch.cat([part.flatten() for part in parts]))
        nothing = memoryview(bytearray(0))
        call = LayerCall(payload, self._layout(0, len(slots)), nothing, None)
        plan = attention.plan(0, self._geometry, step, None)
        attention.store(pool, plan, call, 0, len(slots))

    def _layout(self, num_rows: int, num_tokens: int) -> PayloadLayout:
        rows = TokenLayout.of(self.layer)
        item_bytes = DTYPE_BYTES[self._geometry.dtype]
        return PayloadLayout.planar(rows, num_rows, num_tokens, item_bytes)

    def _expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        results = []
        for request in self._requests:
            at = torch.arange(request.seq_len)
            held = torch.tensor(request.held, dtype=torch.int64)
            at = at[torch.isin(at // self._block_size, held)]
            rows = torch.arange(len(request.query)) + request.position
            results.append(
                exact_attention(
                    self.layer,
                    request.query,
                    *stored_kv(
                        self._geometry, self.layer, request.key[at], request.value[at]
                    ),
                    rows,
                    at,
                )
            )
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._dtype)


def _padded(rows: list[list[int]], padding: int) -> np.ndarray:
    table = np.full((len(rows), max(1, *map(len, rows))), padding, np.int32)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
