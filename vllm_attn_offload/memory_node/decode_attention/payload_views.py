# SPDX-License-Identifier: Apache-2.0
"""A LAYER payload as torch tensors."""

from __future__ import annotations

import torch

from vllm_attn_offload.protocol.geometry import LayerGeometry
from vllm_attn_offload.protocol.layer import PayloadLayout, StridedRows


def payload_views(
    payload: memoryview | torch.Tensor,
    layout: PayloadLayout,
    layer: LayerGeometry,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of q, k and v, each ``[rows, heads, size]``.

    Args:
        payload: Bytes, or elements of ``dtype`` on any device.
        layout: Where q, k and v lie.
        layer: Their shapes.
        dtype: Of their elements.
    """
    elements = payload
    if not isinstance(elements, torch.Tensor):
        elements = torch.frombuffer(elements, dtype=dtype)
    heads, kv_heads = layer.num_query_heads, layer.num_kv_heads
    queries, tokens = layout.num_query_rows, layout.num_tokens
    return (
        _rows(elements, queries, heads, layer.head_size, layout.query),
        _rows(elements, tokens, kv_heads, layer.head_size, layout.key),
        _rows(elements, tokens, kv_heads, layer.v_head_size, layout.value),
    )


def _rows(
    elements: torch.Tensor, num_rows: int, heads: int, size: int, columns: StridedRows
) -> torch.Tensor:
    item_bytes = elements.element_size()
    return elements.as_strided(
        (num_rows, heads, size),
        (columns.stride // item_bytes, size, 1),
        elements.storage_offset() + columns.offset // item_bytes,
    )
