# SPDX-License-Identifier: Apache-2.0
"""Frames whose rows lie in device memory that both processes map: no host copies them.

Everything else of a frame, and every other frame, is as in shared memory of the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.protocol.frames import FrameHeader
from vllm_attn_offload.protocol.messages import SlotLayout
from vllm_attn_offload.transport.shared_memory import (
    ChannelSetup,
    SharedMemoryTransport,
)

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 512  # as torch's own allocations: kernels load whole vectors


class DeviceMemoryTransport(SharedMemoryTransport):
    """Shared memory, and beside each of its slots one of device memory.

    The host orders both sides: a frame is announced once its rows are complete, and its
    slot is given back once nobody reads it. No kernel ever waits for the other process,
    which may die.

    Args:
        setup: With device memory for the rows.
    """

    name = "device memory"

    def __init__(self, setup: ChannelSetup) -> None:
        super().__init__(setup)
        layout, is_node = setup.rows_layout, setup.is_node
        assert setup.rows is not None
        assert layout is not None
        self._device_memory = setup.rows
        requests, replies = row_slots(setup.rows.bytes, layout)
        self._rows_out = replies if is_node else requests
        self._rows_in = requests if is_node else replies
        self._max_bytes_out = layout.reply_bytes if is_node else layout.request_bytes
        self._until: Callable[[], None] | None = None

    def fits(self, num_bytes: int) -> bool:
        """True if rows of that size can be sent."""
        return num_bytes <= self._max_bytes_out

    def rows_buffer(self, num_bytes: int) -> torch.Tensor:
        """Lend device memory for the next frame's rows; `send` takes no payload then.

        Returns:
            uint8 ``[num_bytes]``, valid until that `send`.

        Raises:
            OSError: The peer is gone, or took nothing for the transport's deadline.
            ValueError: They do not fit.
        """
        if not self.fits(num_bytes):
            raise ValueError(
                f"{num_bytes:,} bytes of rows were to be sent; a slot of device memory "
                f"takes {self._max_bytes_out:,}. Send them through the host."
            )
        slots = self._rows_out
        # Takes the frame's slot, as all payloads do; not where another thread closed.
        self.payload_buffer(0)
        return slots[self._channel.taken][:num_bytes]

    def receive_rows(self, num_bytes: int) -> torch.Tensor:
        """Return the rows of the current frame.

        Returns:
            uint8 ``[num_bytes]``, valid until the next frame is received.

        Raises:
            ProtocolError: They do not fit the frame's slot.
        """
        slots = self._rows_in
        self._current_slot()  # there is none where another thread closed the channel
        rows = slots[self._channel.current]
        if num_bytes > rows.numel():
            raise ProtocolError(
                f"{num_bytes:,} bytes of rows; a slot of device memory takes "
                f"{rows.numel():,}"
            )
        return rows[:num_bytes]

    def keep_rows(self, until: Callable[[], None]) -> None:
        """Call ``until``, which waits for the device, before the slot is given back."""
        self._until = until

    def receive_header(self, header: FrameHeader, timeout_s: float | None) -> None:
        until, self._until = self._until, None
        if until is not None:
            until()
        super().receive_header(header, timeout_s)

    def _free_memory(self) -> None:
        super()._free_memory()
        self._rows_out = self._rows_in = []
        self._device_memory.close()


def rows_num_bytes(layout: SlotLayout) -> int:
    """Return the bytes of device memory that a channel needs."""
    return layout.num_slots * (
        _aligned(layout.request_bytes) + _aligned(layout.reply_bytes)
    )


def row_slots(
    memory: torch.Tensor, layout: SlotLayout
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Cut device memory into slots of requests, and of replies behind them.

    Args:
        memory: uint8 ``[rows_num_bytes(layout)]`` or more.
        layout: Number of slots, and bytes of a request and a reply.

    Returns:
        Views, uint8 ``[request_bytes]`` and ``[reply_bytes]``, one per slot.
    """
    slots: list[list[torch.Tensor]] = []
    begin = 0
    for size in (layout.request_bytes, layout.reply_bytes):
        starts = [begin + i * _aligned(size) for i in range(layout.num_slots)]
        slots.append([memory[start : start + size] for start in starts])
        begin += layout.num_slots * _aligned(size)
    return slots[0], slots[1]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
