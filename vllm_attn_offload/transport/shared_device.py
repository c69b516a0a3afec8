# SPDX-License-Identifier: Apache-2.0
"""What a data channel needs of an accelerator whose memory two processes map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class DeviceMemory(Protocol):
    """Memory of a device, for as long as one of its mappings is open.

    Attributes:
        descriptor: File descriptor that another process can map.
        bytes: All of it, uint8.
    """

    descriptor: int
    bytes: torch.Tensor

    def close(self) -> None:
        """Wait for what this process enqueued, and unmap. Safe to call twice."""


class SharedDevice(Protocol):
    """A device that shares its memory with other processes of the host.

    Attributes:
        name: Of the one physical device, as long as the host runs.
    """

    name: str

    def allocate(self, num_bytes: int) -> DeviceMemory:
        """New memory.

        Raises:
            OSError: There is none.
        """

    def map(self, descriptor: int, num_bytes: int) -> DeviceMemory:
        """Memory of another process; the descriptor is owned from here on.

        Raises:
            OSError: It is no device memory of that size, or this device cannot reach
                it.
        """


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """What a memory node shares of its device: bytes of a slot, each way."""

    device: SharedDevice
    request_bytes: int
    reply_bytes: int
