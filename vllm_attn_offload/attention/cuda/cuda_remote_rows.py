# SPDX-License-Identifier: Apache-2.0
"""What nodes attended, on its way from the host to the device."""

from __future__ import annotations

import numpy as np
import torch

from vllm_attn_offload.attention.cuda.device_streams import DeviceStreams
from vllm_attn_offload.attention.cuda.local_attention import RemotePart
from vllm_attn_offload.client.remote_attention import SentStep
from vllm_attn_offload.client.step_partition import StepPartition


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
        self._step: SentStep | None = None
        self._buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._device_lse: torch.Tensor | None = None

    def host_out(self, like: torch.Tensor) -> torch.Tensor:
        """Memory of the host for rows of a device tensor."""
        host, _ = self._pair("out", tuple(like.shape), like.dtype)
        return host

    def begin(self, step: SentStep, output: torch.Tensor) -> None:
        """Make room for the rows of a layer, and say once per step which they are.

        ``out`` ``[num_rows, num_heads, v_head_size]`` and, where the plan needs a
        merge, ``lse`` ``[num_rows, num_heads]`` are to be filled on the host.
        """
        if self._step is step:
            return
        self._step = step
        which = _which_rows(step.plan)
        num_rows = which.shape[1]
        host_which, device_which = self._pair("which", which.shape, torch.int64)
        host_which.copy_(torch.from_numpy(which))
        self._streams.copy(device_which, host_which)
        num_heads = output.shape[1]
        self.out, device_out = self._pair(
            "out", (num_rows, *output.shape[1:]), output.dtype
        )
        self.lse = self._device_lse = transposed = None
        if step.plan.needs_merge:
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


def _which_rows(plan: StepPartition) -> np.ndarray:
    """int64 ``[2, num_rows]``: remote rows, and whether they have no local part."""
    rows = plan.remote_rows
    if rows is None:
        rows = np.arange(plan.num_tokens, dtype=np.int64)
    is_alone = np.ones(plan.num_tokens, dtype=np.int64)
    for prefill in plan.prefills:
        is_alone[prefill.begin : prefill.end] = 0
    return np.stack((rows, is_alone[rows]))
