# SPDX-License-Identifier: Apache-2.0
"""What an exchange with memory nodes needs of an accelerator: two streams, buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A point on the copy stream."""

    def wait(self) -> None:
        """Let the host wait until the copy stream is there."""


class DeviceStreams(Protocol):
    """The stream that computes and one that copies; each runs in order.

    Nothing here waits for the device but ``Mark.wait``.
    """

    def launch(self, kernels: Callable[[], object]) -> None:
        """Enqueue on the compute stream what ``kernels`` does to device tensors."""

    def fork(self) -> None:
        """Let later copies wait for what the compute stream holds now."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue on the copy stream; one side is a dense tensor of `host_buffer`."""

    def mark(self) -> Mark:
        """The end of what the copy stream holds now."""

    def join(self) -> None:
        """Let later kernels wait for what the copy stream holds now."""

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """New uint8 memory of the host that the device copies to and from directly."""

    def device_buffer(self, num_bytes: int) -> torch.Tensor:
        """New uint8 memory of the device."""
