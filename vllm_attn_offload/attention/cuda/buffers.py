# SPDX-License-Identifier: Apache-2.0
"""Buffers that rows of q, k, v pass on their way to the host; kept between layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_attn_offload.attention.cuda.device_streams import DeviceStreams, Mark


class StagedRows:
    """One layer's rows, from the device to the host in one copy.

    Args:
        streams: Of the device.
    """

    def __init__(self, streams: DeviceStreams) -> None:
        self._streams = streams
        self._on_device = self._on_host = torch.empty(0, dtype=torch.uint8)

    def copy_out(
        self, parts: Sequence[torch.Tensor], *, may_read_in_place: bool
    ) -> tuple[list[torch.Tensor], Mark]:
        """Enqueue the copy of tensors ``[num_tokens, heads, size]``.

        Args:
            parts: Of one dtype; they lie behind each other in a row.
            may_read_in_place: ``parts`` stay as they are until the mark is waited for.

        Returns:
            The parts on the host, and when they are there.
        """
        first = parts[0]
        shape = (first.shape[0], sum(part.shape[1] * part.shape[2] for part in parts))
        size = shape[0] * shape[1] * first.element_size()
        host = self._host(size).view(first.dtype).view(shape)
        source = fused_rows(parts) if may_read_in_place else None
        if source is None:
            source = self._device(size).view(first.dtype).view(shape)
            flat = [part.flatten(1) for part in parts]
            self._streams.launch(lambda: torch.cat(flat, dim=1, out=source))
        self._streams.fork()
        self._streams.copy(host, source)
        widths = [part.shape[1] * part.shape[2] for part in parts]
        views = [
            piece.view(part.shape)
            for piece, part in zip(host.split(widths, dim=1), parts, strict=True)
        ]
        return views, self._streams.mark()

    def _host(self, size: int) -> torch.Tensor:
        if self._on_host.numel() < size:
            # Pinning memory is slow: steps that grow token by token pay it seldom.
            self._on_host = self._streams.host_buffer(_rounded(size))
        return self._on_host[:size]

    def _device(self, size: int) -> torch.Tensor:
        if self._on_device.numel() < size:
            self._on_device = self._streams.device_buffer(_rounded(size))
        return self._on_device[:size]


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def fused_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The rows ``[num_tokens, width]`` that ``parts`` are views of, without gaps."""
    first = parts[0]
    width = sum(part.shape[1] * part.shape[2] for part in parts)
    address = first.data_ptr()
    for part in parts:
        token, head, element = part.stride()
        if (
            part.data_ptr() != address
            or element != 1
            or head != part.shape[2]
            or (part.shape[0] > 1 and token != width)
        ):
            return None
        address += part.shape[1] * part.shape[2] * part.element_size()
    return first.as_strided((first.shape[0], width), (width, 1))
