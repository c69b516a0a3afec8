# SPDX-License-Identifier: Apache-2.0
"""Streams and buffers of an accelerator: the interface, and CUDA's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A point on a stream."""

    def wait(self) -> None:
        """Let the host wait until the stream is there."""


class DeviceStreams(Protocol):
    """The stream that computes and one that copies; each runs in order.

    Nothing here waits for the device but ``Mark.wait``.
    """

    def launch(self, kernels: Callable[[], object]) -> None:
        """Enqueue on the compute stream what ``kernels`` does to device tensors."""

    def fork(self) -> None:
        """Let later copies wait for what the compute stream holds now."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` to ``target``, ``[...]`` alike, on the copy stream.

        One side is a dense tensor of `host_buffer`.
        """

    def mark(self) -> Mark:
        """The end of what the copy stream holds now."""

    def computed(self) -> Mark:
        """The end of what the compute stream holds now."""

    def join(self) -> None:
        """Let later kernels wait for what the copy stream holds now."""

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """New uint8 memory of the host that the device copies to and from directly."""

    def device_buffer(self, num_bytes: int) -> torch.Tensor:
        """New uint8 memory of the device."""


class CudaStreams:
    """``DeviceStreams`` of a CUDA device, for one thread at a time.

    The compute stream is whichever is current at a call: graph capture changes it.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        # A wait takes an event's state when it is called, so two events are enough.
        self._forked = torch.cuda.Event()
        self._joined = torch.cuda.Event()

    def launch(self, kernels: Callable[[], object]) -> None:
        """Run ``kernels``, which enqueue themselves."""
        kernels()

    def fork(self) -> None:
        """Let later copies wait for what the compute stream holds now."""
        self._forked.record(torch.cuda.current_stream(self._device))
        self._copies.wait_event(self._forked)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between pinned and device memory, ``[...]`` alike."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def mark(self) -> CudaMark:
        """An event at the end of the copy stream."""
        event = torch.cuda.Event()
        event.record(self._copies)
        return CudaMark(event)

    def computed(self) -> CudaMark:
        """An event at the end of the compute stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return CudaMark(event)

    def join(self) -> None:
        """Let later kernels wait for what the copy stream holds now."""
        self._joined.record(self._copies)
        torch.cuda.current_stream(self._device).wait_event(self._joined)

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Pinned memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def device_buffer(self, num_bytes: int) -> torch.Tensor:
        """Memory of the device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


class CudaMark:
    """A CUDA event; other threads of the process run while one waits."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """Wait for the event alone, not for the device."""
        self._event.synchronize()
