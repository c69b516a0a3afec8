# SPDX-License-Identifier: Apache-2.0
"""Buffers that rows pass on their way to the host and back; kept between layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_attn_offload.attention.cuda.prefill import RemotePart
from vllm_attn_offload.attention.cuda.streams import DeviceStreams, Mark
from vllm_attn_offload.client.sent_step import SentStep
from vllm_attn_offload.client.step_partition import StepPartition


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


class RemoteRows:
    """Buffers of one micro-batch for rows that come back; kept between layers.

    The host fills them only after it has waited for rows of the same layer, which the
    copy stream copied out after it had copied these in for the layer before.

    Args:
        streams: Of the device.
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    on_device: RemotePart

    def __init__(self, streams: DeviceStreams) -> None:
        self._streams = streams
        self._begun: tuple[SentStep, torch.Size, bool] | None = None
        self._buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._device_lse: torch.Tensor | None = None

    def host_out(self, like: torch.Tensor) -> torch.Tensor:
        """Host tensor of the shape ``[num_rows, ...]`` and dtype of ``like``."""
        host, _ = self._pair("out", tuple(like.shape), like.dtype)
        return host

    def begin(self, step: SentStep, output: torch.Tensor, *, with_lse: bool) -> None:
        """Make room for the rows of a layer, and say which they are.

        Once for layers of a step that are alike. ``out`` ``[num_rows, num_heads,
        v_head_size]`` and, where the step needs a merge or it is asked for, ``lse``
        ``[num_rows, num_heads]`` are to be filled on the host.
        """
        begun = (step, output.shape[1:], with_lse)
        if self._begun is not None and self._begun[0] is step and self._begun == begun:
            return
        self._begun = begun
        which = _which_rows(step.partition)
        num_rows = which.shape[1]
        host_which, device_which = self._pair("which", which.shape, torch.int64)
        host_which.copy_(torch.from_numpy(which))
        self._streams.copy(device_which, host_which)
        num_heads = output.shape[1]
        self.out, device_out = self._pair(
            "out", (num_rows, *output.shape[1:]), output.dtype
        )
        self.lse = self._device_lse = transposed = None
        if with_lse or step.partition.needs_merge:
            self.lse, self._device_lse = self._pair(
                "lse", (num_rows, num_heads), torch.float32
            )
            transposed = self._device_lse.t()
        self.on_device = RemotePart(
            device_out, transposed, device_which[0], device_which[1]
        )

    def copy_in(self) -> None:
        """Enqueue the copies of what the host filled."""
        self._streams.copy(self.on_device.out, self.out)
        if self.lse is not None and self._device_lse is not None:
            self._streams.copy(self._device_lse, self.lse)

    def _pair(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = int(np.prod(shape)) * dtype.itemsize
        pair = self._buffers.get(name)
        if pair is None or pair[0].numel() < size:
            rounded = 1 << max(0, size - 1).bit_length()
            pair = (
                self._streams.host_buffer(rounded),
                self._streams.device_buffer(rounded),
            )
            self._buffers[name] = pair
        host, device = (buffer[:size].view(dtype).view(shape) for buffer in pair)
        return host, device


def _which_rows(partition: StepPartition) -> np.ndarray:
    """int64 ``[2, num_rows]``: remote rows, and whether they have no local part."""
    rows = partition.remote_rows
    if rows is None:
        rows = np.arange(partition.num_tokens, dtype=np.int64)
    is_alone = np.ones(partition.num_tokens, dtype=np.int64)
    for prefill in partition.prefills:
        is_alone[prefill.begin : prefill.end] = 0
    return np.stack((rows, is_alone[rows]))
