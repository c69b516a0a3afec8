# SPDX-License-Identifier: Apache-2.0
"""The bytes of a layer's q, k, v and output, with at most one copy each way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


class QKVRows:
    """Turns q, k, v into one row per token, ``q | k | v``, as frames carry them.

    Models with a fused QKV projection hand out three views of such rows: then nothing
    is copied. Otherwise the rows are written into a buffer that is kept.
    """

    def __init__(self) -> None:
        self._rows = torch.empty(0, dtype=torch.uint8)
        self._out = torch.empty(0, dtype=torch.uint8)
        self._out_is_copy = False

    def pack(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> memoryview:
        """Bytes of ``[num_tokens, q + k + v]``.

        Args:
            query: ``[num_tokens, num_heads, head_size]`` or flattened, CPU.
            key: ``[num_tokens, num_kv_heads, head_size]`` or flattened.
            value: ``[num_tokens, num_kv_heads, v_head_size]`` or flattened.
        """
        num_tokens = query.shape[0]
        parts = [x.reshape(num_tokens, -1) for x in (query, key, value)]
        rows = _fused(parts)
        if rows is None:
            rows = self._gather(parts)
        return _bytes(rows)

    def output_bytes(self, output: torch.Tensor) -> memoryview:
        """Where the reply is received: ``output`` itself where it is contiguous.

        Args:
            output: ``[num_tokens, num_heads, v_head_size]`` or flattened.
        """
        self._out_is_copy = not output.is_contiguous()
        if not self._out_is_copy:
            return _bytes(output)
        self._out = _grown(self._out, output.nbytes)
        return _bytes(self._out[: output.nbytes])

    def finish(self, output: torch.Tensor) -> None:
        """Move a reply that could not be received in place into ``output``."""
        if self._out_is_copy:
            received = self._out[: output.nbytes].view(output.dtype)
            output.copy_(received.view(output.shape))

    def _gather(self, parts: list[torch.Tensor]) -> torch.Tensor:
        num_tokens = parts[0].shape[0]
        width = sum(part.shape[1] for part in parts)
        num_bytes = num_tokens * width * parts[0].element_size()
        self._rows = _grown(self._rows, num_bytes)
        rows = self._rows[:num_bytes].view(parts[0].dtype).view(num_tokens, width)
        return torch.cat(parts, dim=1, out=rows)


def _fused(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """The rows that q, k, v are views of, if that is what they are."""
    width = sum(part.shape[1] for part in parts)
    offset = parts[0].storage_offset()
    storage = parts[0].untyped_storage().data_ptr()
    for part in parts:
        is_view = part.untyped_storage().data_ptr() == storage
        is_next = part.storage_offset() == offset
        is_row = part.stride(0) == width or part.shape[0] == 1
        if not (is_view and is_next and is_row and part.stride(1) == 1):
            return None
        offset += part.shape[1]
    return parts[0].as_strided((parts[0].shape[0], width), (width, 1))


def _grown(buffer: torch.Tensor, num_bytes: int) -> torch.Tensor:
    if buffer.numel() >= num_bytes:
        return buffer
    return torch.empty(num_bytes, dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    array: npt.NDArray[np.uint8] = flat.numpy()
    return array.data
