# SPDX-License-Identifier: Apache-2.0
"""LAYER payloads: where q, k and v of a layer lie."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attn_offload.protocol.geometry import LayerGeometry

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Elements of one token's q, k, v and output."""

    q: int
    k: int
    v: int
    out: int

    @classmethod
    def of(cls, layer: LayerGeometry) -> TokenLayout:
        """Row layout of a layer."""
        return cls(
            q=layer.num_query_heads * layer.head_size,
            k=layer.num_kv_heads * layer.head_size,
            v=layer.num_kv_heads * layer.v_head_size,
            out=layer.num_query_heads * layer.v_head_size,
        )

    @property
    def width(self) -> int:
        """Elements of q, k and v of one token."""
        return self.q + self.k + self.v


@dataclass(frozen=True, slots=True)
class StridedRows:
    """Rows inside a LAYER payload: first byte, and bytes from row to row."""

    offset: int
    stride: int


@dataclass(frozen=True, slots=True)
class PayloadLayout:
    """Where q, k and v lie in a LAYER payload.

    Args:
        num_query_rows: Rows of q.
        num_tokens: Rows of k and of v.
        query: ``num_query_heads * head_size`` elements a row.
        key: ``num_kv_heads * head_size`` elements a row.
        value: ``num_kv_heads * v_head_size`` elements a row.
        num_bytes: Of the payload.
    """

    num_query_rows: int
    num_tokens: int
    query: StridedRows
    key: StridedRows
    value: StridedRows
    num_bytes: int

    @classmethod
    def fused(
        cls, rows: TokenLayout, num_tokens: int, item_bytes: int
    ) -> PayloadLayout:
        """One row ``q | k | v`` per token, as a fused QKV projection writes them."""
        q, k, stride = (item_bytes * n for n in (rows.q, rows.k, rows.width))
        columns = (
            StridedRows(0, stride),
            StridedRows(q, stride),
            StridedRows(q + k, stride),
        )
        return cls(num_tokens, num_tokens, *columns, num_tokens * stride)

    @classmethod
    def planar(
        cls, rows: TokenLayout, num_query_rows: int, num_tokens: int, item_bytes: int
    ) -> PayloadLayout:
        """All rows of q, then all of k, then all of v."""
        q, k, v = (item_bytes * n for n in (rows.q, rows.k, rows.v))
        key = num_query_rows * q
        value = key + num_tokens * k
        columns = (StridedRows(0, q), StridedRows(key, k), StridedRows(value, v))
        return cls(num_query_rows, num_tokens, *columns, value + num_tokens * v)
