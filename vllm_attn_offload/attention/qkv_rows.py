# SPDX-License-Identifier: Apache-2.0
"""The bytes of a layer's q, k, v and output, with at most one copy each way."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import numpy.typing as npt
import torch

_Shapes = tuple[torch.dtype, tuple[torch.Size, ...]]


class QKVRows:
    """Turns q, k, v into one row per token, ``q | k | v``, as frames carry them.

    Models with a fused QKV projection hand out three views of such rows: then nothing
    is copied. Otherwise the rows are written into a buffer that is kept, and laid out
    once for all layers of a step.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._shapes: _Shapes | None = None
        self._targets: tuple[torch.Tensor, ...] = ()
        self._bytes = memoryview(b"")
        self._out = torch.empty(0, dtype=torch.uint8)
        self._out_is_copy = False

    def pack(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> memoryview:
        """Bytes of ``[num_tokens, q + k + v]``, until the tensors go or the next call.

        Args:
            query: ``[num_tokens, num_heads, head_size]`` or flattened, CPU.
            key: ``[num_tokens, num_kv_heads, head_size]`` or flattened.
            value: ``[num_tokens, num_kv_heads, v_head_size]`` or flattened.
        """
        parts = (query, key, value)
        if _is_fused(parts):
            return _bytes_at(query.data_ptr(), sum(part.nbytes for part in parts))
        shapes = (query.dtype, (query.shape, key.shape, value.shape))
        if shapes != self._shapes:
            self._lay_out(parts)
            self._shapes = shapes
        for target, part in zip(self._targets, parts, strict=True):
            target.copy_(part)
        return self._bytes

    def output_bytes(self, output: torch.Tensor) -> memoryview:
        """Where the reply is received: ``output`` itself where it is contiguous.

        Args:
            output: ``[num_tokens, num_heads, v_head_size]`` or flattened.
        """
        self._out_is_copy = not output.is_contiguous()
        if not self._out_is_copy:
            return _bytes_at(output.data_ptr(), output.nbytes)
        self._out = _grown(self._out, output.nbytes)
        return _own_bytes(self._out, output.nbytes)

    def finish(self, output: torch.Tensor) -> None:
        """Move a reply that could not be received in place into ``output``."""
        if self._out_is_copy:
            received = self._out[: output.nbytes].view(output.dtype)
            output.copy_(received.view(output.shape))

    def _lay_out(self, parts: tuple[torch.Tensor, ...]) -> None:
        """View the buffer as rows and each of its columns like q, k or v."""
        num_tokens = parts[0].shape[0]
        num_bytes = sum(part.nbytes for part in parts)
        self._buffer = _grown(self._buffer, num_bytes)
        rows = self._buffer[:num_bytes].view(parts[0].dtype).view(num_tokens, -1)
        columns = rows.split([math.prod(part.shape[1:]) for part in parts], dim=1)
        self._targets = tuple(
            column.unflatten(1, part.shape[1:])
            for column, part in zip(columns, parts, strict=True)
        )
        self._bytes = _own_bytes(self._buffer, num_bytes)


def _is_fused(parts: tuple[torch.Tensor, ...]) -> bool:
    """Whether q, k and v are neighbouring columns of the same rows."""
    width = sum(math.prod(part.shape[1:]) for part in parts)
    offset = parts[0].storage_offset()
    storage = parts[0].untyped_storage().data_ptr()
    for part in parts:
        stride, inner = part.stride(), 1
        for size, step in zip(part.shape[:0:-1], stride[:0:-1], strict=True):
            if step != inner and size != 1:
                return False
            inner *= size
        if (
            (stride[0] != width and part.shape[0] != 1)
            or part.storage_offset() != offset
            or part.untyped_storage().data_ptr() != storage
        ):
            return False
        offset += inner
    return True


def _grown(buffer: torch.Tensor, num_bytes: int) -> torch.Tensor:
    if buffer.numel() >= num_bytes:
        return buffer
    return torch.empty(num_bytes, dtype=torch.uint8)


def _own_bytes(buffer: torch.Tensor, num_bytes: int) -> memoryview:
    array: npt.NDArray[np.uint8] = buffer.numpy()
    return array.data[:num_bytes]


def _bytes_at(address: int, num_bytes: int) -> memoryview:
    # Once per layer: cheaper than a tensor of bytes, its array and the array's buffer.
    # Nothing is kept alive; the caller holds the tensor while the bytes are in use.
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(address)).cast("B")
