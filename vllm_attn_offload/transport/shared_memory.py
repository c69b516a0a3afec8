# SPDX-License-Identifier: Apache-2.0
"""Frames through shared memory; the Unix socket beside it shows that the peer lives."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.native.channel import (
    MALFORMED,
    OVERRUN,
    TOO_LONG,
    Channel,
    NativeChannels,
)
from vllm_attn_offload.native.waits import (
    INTERRUPTED,
    READY,
    TIMED_OUT,
    milliseconds,
)
from vllm_attn_offload.protocol.frames import FRAME_HEADER_BYTES, FrameHeader
from vllm_attn_offload.protocol.messages import SlotLayout
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.channel_memory import (
    NO_RING,
    ChannelMemory,
    Slot,
)
from vllm_attn_offload.transport.cuda_memory import DeviceMemory
from vllm_attn_offload.transport.streams import has_hung_up

_NOTHING_CAME = "nothing received for {:.1f} s"
#: No slot came free in time.
NOTHING_TAKEN = "the peer takes no data"


@dataclass(frozen=True, slots=True)
class ChannelSetup:
    """One side of a channel through memory that both sides map.

    Attributes:
        sock: Unix socket of the attachment; owned by the transport, and unused
            otherwise.
        memory: Slots and counters; owned by the transport.
        channels: The C library.
        rows: Device memory beside the slots, owned by the transport; None: there is
            none.
        rows_layout: Its slots, as many as ``memory`` has.
        is_node: True for the node, which sends replies; workers send requests.
        stall_timeout_s: Longest wait for a free slot, in seconds.
        spin_us: Longest spin before a wait blocks.
    """

    sock: socket.socket
    memory: ChannelMemory
    channels: NativeChannels
    rows: DeviceMemory | None
    rows_layout: SlotLayout | None
    is_node: bool
    stall_timeout_s: float
    spin_us: int


class SharedMemoryTransport(Transport):
    """A data channel through slots that both processes map.

    Counters announce frames and free their slots. The slot that was freed last is taken
    first: it is still in the caches, and few slots ever touch memory. Headers and slot
    indices are read from shared memory once, and checked then. Who sends waits where no
    slot is free: a channel holds as many unread frames each way as it has slots.

    Args:
        setup: The memory, and which side this is.
    """

    name = "shared memory"

    def __init__(self, setup: ChannelSetup) -> None:
        memory = setup.memory
        self._sock, self._memory, self._native = setup.sock, memory, setup.channels
        self._stall_ms = milliseconds(setup.stall_timeout_s)
        self._channel = memory.channel(
            setup.sock, setup.spin_us * 1000, is_node=setup.is_node
        )
        self._ref = ctypes.byref(self._channel)
        self._outgoing, self._frame = (
            _header_of(self._channel, field)
            for field in (Channel.outgoing, Channel.frame)
        )
        rings = memory.replies, memory.requests
        self._out, self._in = rings if setup.is_node else rings[::-1]
        self._lent: memoryview | None = None
        self._current: Slot | None = None
        # A thread that finds the channel closed as it leaves releases the memory: none
        # is unmapped under a thread in C. Flags, because locks cost more per frame.
        self._is_closed = self._is_sending = self._is_receiving = False
        self._release_lock = threading.Lock()

    def payload_buffer(self, num_bytes: int) -> memoryview:
        self._is_sending = True
        try:
            slot = self._out.slots[self._take_slot()]
            _check_size(num_bytes, slot)
            self._lent = slot.view(num_bytes)
            return self._lent
        finally:
            self._is_sending = False
            if self._is_closed:
                self._release()

    def send(self, header: FrameHeader, *payload: memoryview) -> None:
        self._is_sending = True
        try:
            index = self._take_slot()
            if len(payload) != 1 or payload[0] is not self._lent:
                slot = self._out.slots[index]
                _check_size(header.num_bytes, slot)
                _copy(payload, slot.payload)
            self._lent = None
            header.pack_into(self._outgoing)
            self._native.send(self._ref)
        finally:
            self._is_sending = False
            if self._is_closed:
                self._release()

    def receive_header(self, header: FrameHeader, timeout_s: float | None) -> None:
        status = self.call(self._native.receive, self._ref, timeout_s)
        self.read_header(header, status, timeout_s)

    @property
    def channel_address(self) -> int:
        """Address of the C library's side of the channel (`native/channel.py`)."""
        return ctypes.addressof(self._channel)

    def call(
        self,
        function: Callable[[Any, int], int],
        argument: Any,
        timeout_s: float | None = None,
    ) -> int:
        """Call a C function that sends and receives on this channel.

        Args:
            function: Called again, for the rest of the time, after an interruption.
            argument: Its first one; the second is the time in milliseconds.
            timeout_s: None: no deadline.

        Raises:
            ConnectionResetError: The channel is closed.
        """
        self._current = None
        self._is_receiving = True
        try:
            if self._is_closed:
                raise ConnectionResetError("the channel was closed")
            return self._uninterrupted(function, argument, milliseconds(timeout_s))
        finally:
            self._is_receiving = False
            if self._is_closed:
                self._release()

    def read_header(
        self, header: FrameHeader, status: int, timeout_s: float | None
    ) -> None:
        """Take the frame that a C function found, as `receive_header` takes one.

        Args:
            header: Overwritten.
            status: The function's result.
            timeout_s: Its deadline.

        Raises:
            ConnectionError: The peer closed the channel.
            TimeoutError: No frame came in time.
            ProtocolError: What came is not a frame.
        """
        if status == OVERRUN:
            raise ProtocolError("more frames were announced than there are slots")
        if status == MALFORMED:
            raise ProtocolError("what was received is not a frame of this protocol")
        if status not in (READY, TOO_LONG):
            raise _ended(status, _NOTHING_CAME, timeout_s)
        header.unpack_from(self._frame)
        if status == TOO_LONG:
            raise ProtocolError(
                f"a frame of {header.num_bytes:,} bytes; at most "
                f"{self._channel.in_ring.slot_bytes:,} fit this channel"
            )
        slots = self._in.slots
        if not slots:
            raise ConnectionResetError("the channel was closed")
        self._current = slots[self._channel.current]

    def receive_payload(self, num_bytes: int) -> memoryview:
        return self._current_slot().view(num_bytes)

    def receive_payload_into(self, target: memoryview) -> None:
        target[:] = self._current_slot().payload[: target.nbytes]

    def has_ended(self) -> bool:
        return has_hung_up(self._sock)

    def linger(self) -> None:
        """Nothing to do: the peer's memory holds what was sent, also when closed."""

    def close(self) -> None:
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._release()

    def _release(self) -> None:
        if self._is_sending or self._is_receiving:
            return
        with self._release_lock:
            self._free_memory()

    def _free_memory(self) -> None:
        """Let go of everything; called again it does nothing."""
        self._out = self._in = NO_RING
        self._current = self._lent = None
        self._memory.close()
        self._sock.close()

    def _take_slot(self) -> int:
        """The slot of the next frame; the same until it is sent."""
        if self._is_closed:
            raise BrokenPipeError("the channel was closed")
        if self._channel.taken < 0:
            status = self._uninterrupted(self._native.take, self._ref, self._stall_ms)
            if status != READY or self._is_closed:
                raise _ended(status, NOTHING_TAKEN, None)
        return self._channel.taken

    def _uninterrupted(
        self, function: Callable[[Any, int], int], argument: Any, timeout_ms: int
    ) -> int:
        started = time.monotonic()
        status = function(argument, timeout_ms)
        while status == INTERRUPTED and not self._is_closed:
            # Signal handlers have run here, and one may have closed the channel.
            left_ms = timeout_ms
            if timeout_ms >= 0:
                spent_ms = int((time.monotonic() - started) * 1000)
                left_ms = max(0, timeout_ms - spent_ms)
            status = function(argument, left_ms)
        return status

    def _current_slot(self) -> Slot:
        slot = self._current
        if slot is None:
            raise ConnectionResetError("the channel was closed")
        return slot


def _ended(status: int, problem: str, timeout_s: float | None) -> OSError:
    if status == TIMED_OUT:
        return TimeoutError(problem.format(timeout_s))
    return ConnectionResetError("the peer closed the connection")


def _header_of(channel: Channel, field: Any) -> memoryview:
    whole = memoryview(channel).cast("B")
    return whole[field.offset : field.offset + FRAME_HEADER_BYTES]


def _check_size(num_bytes: int, slot: Slot) -> None:
    if num_bytes > slot.payload.nbytes:
        raise ValueError(
            f"a frame of {num_bytes:,} bytes was to be sent; this channel allows "
            f"{slot.payload.nbytes:,}. Keep to the limits of the session."
        )


def _copy(parts: tuple[memoryview, ...], target: memoryview) -> None:
    begin = 0
    for part in parts:
        end = begin + part.nbytes
        target[begin:end] = part
        begin = end
