# SPDX-License-Identifier: Apache-2.0
"""The bytes of a layer's q, k, v for one node, with at most one copy."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch

_Key = tuple[torch.dtype, tuple[tuple[int, ...], ...]]
_Layout = tuple[tuple[int, ...], ...]
_MAX_BUFFERS = 64


class LayerPayload:
    """Lays out the rows of q, k and v that one memory node gets.

    Models with a fused QKV projection hand out three views of rows ``q | k | v``: where
    a node gets all of them, nothing is copied. Otherwise q, k and v are copied one
    behind the other into a buffer that is kept.

    Args:
        query_heads: Heads of q that the node attends with; None: all.
        kv_heads: Heads of k and v that it stores; None: all.
    """

    def __init__(
        self, query_heads: slice | None = None, kv_heads: slice | None = None
    ) -> None:
        self._query_heads = query_heads or slice(None)
        self._kv_heads = kv_heads or slice(None)
        self._has_all_heads = query_heads is None and kv_heads is None
        # Layers of a step are alike: what was found for one holds for the next.
        self._layout: _Layout | None = None
        self._fused: tuple[int, int, int] | None = None
        # Views of each buffer that was handed out; a transport has a few of them.
        self._targets: dict[int, _Targets] = {}

    def fused(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> memoryview | None:
        """Bytes of all rows where they are, or None where they are not fused.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, CPU.
            key: ``[num_tokens, num_kv_heads, head_size]``.
            value: ``[num_tokens, num_kv_heads, v_head_size]``.
        """
        layout = (query.stride(), key.stride(), value.stride(), query.shape)
        if layout != self._layout:
            self._layout = layout
            self._fused = self._fused_layout(query, key, value)
        if self._fused is None:
            return None
        key_offset, value_offset, num_bytes = self._fused
        address = query.data_ptr()
        if (
            key.data_ptr() - address != key_offset
            or value.data_ptr() - address != value_offset
        ):
            return None
        return bytes_at(address, num_bytes)

    def _fused_layout(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[int, int, int] | None:
        """Offsets of k and v from q, and bytes of all rows, if they can be fused."""
        num_tokens = query.shape[0]
        num_bytes = query.nbytes + key.nbytes + value.nbytes
        for part in (query, key, value):
            token, head, element = part.stride()
            row_bytes = token * part.element_size()
            if (
                not self._has_all_heads
                or element != 1
                or head != part.shape[2]
                or (num_tokens > 1 and row_bytes * num_tokens != num_bytes)
            ):
                return None
        key_offset = query.nbytes // num_tokens
        return key_offset, key_offset + key.nbytes // num_tokens, num_bytes

    def planar(
        self,
        parts: tuple[torch.Tensor, ...],
        rows: tuple[torch.Tensor | None, ...],
        payload_buffer: Callable[[int], memoryview],
    ) -> memoryview:
        """Copy the node's rows: q, then k, then v.

        Args:
            parts: q ``[num_tokens, num_heads, head_size]``, and where the layer
                stores k ``[num_tokens, num_kv_heads, head_size]`` and v ``[num_tokens,
                num_kv_heads, v_head_size]``, CPU.
            rows: int64 rows of each part that the node gets; None: all.
            payload_buffer: Returns that many writable bytes, the same object for the
                same memory and size.

        Returns:
            The buffer; empty, and not asked for, where there are no rows.
        """
        if not self._has_all_heads:
            heads = (self._query_heads, self._kv_heads, self._kv_heads)
            parts = tuple(
                part[:, mine] for part, mine in zip(parts, heads, strict=False)
            )
        shapes = tuple(
            (part.shape[0] if index is None else index.shape[0], *part.shape[1:])
            for part, index in zip(parts, rows, strict=True)
        )
        num_bytes = parts[0].element_size() * sum(map(math.prod, shapes))
        if not num_bytes:
            return memoryview(b"")
        buffer = payload_buffer(num_bytes)
        views = self._views(buffer, (parts[0].dtype, shapes))
        for target, part, index in zip(views, parts, rows, strict=True):
            target.copy_(part if index is None else part[index])
        return buffer

    def _views(self, buffer: memoryview, key: _Key) -> list[torch.Tensor]:
        """q, k and v as they lie in a buffer, which a transport hands out again."""
        targets = self._targets.get(id(buffer))
        if targets is None or targets.key != key:
            targets = _Targets(key, buffer)
            if len(self._targets) >= _MAX_BUFFERS:
                self._targets.clear()
            self._targets[id(buffer)] = targets
        return targets.views


class _Targets:
    """q, k and v as they lie in a buffer, which is kept alive."""

    def __init__(self, key: _Key, buffer: memoryview) -> None:
        self.key = key
        self._buffer = buffer
        dtype, shapes = key
        elements = torch.frombuffer(buffer, dtype=dtype)
        pieces = elements.split([math.prod(shape) for shape in shapes])
        self.views = [
            piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)
        ]


def bytes_at(address: int, num_bytes: int) -> memoryview:
    """Bytes of a tensor that the caller holds while they are in use."""
    # Once per layer: cheaper than a tensor of bytes, its array and the array's buffer.
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(address)).cast("B")
