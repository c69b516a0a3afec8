# SPDX-License-Identifier: Apache-2.0
"""Memory that a worker and its memory node share: counters and slots for frames.

It has no name in any file system, so nothing is left however the two processes end.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
from dataclasses import dataclass
from typing import TypeVar

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.native.channel import Channel, RingPlace
from vllm_attn_offload.native.waits import Signal
from vllm_attn_offload.protocol.frames import FRAME_HEADER_BYTES
from vllm_attn_offload.protocol.messages import SlotLayout

#: Counters: requests written, requests freed, replies written, replies freed.
NUM_SIGNALS = 4

_SIGNAL_STRIDE = 128  # two cache lines: processors fetch them in pairs
_IS_WAITING_OFFSET = 8
_HEADER_STRIDE = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Slot:
    """Memory of one payload, as long as the longest one.

    Attributes:
        payload: All its bytes, format ``B``.
    """

    __slots__ = ("_view", "payload")

    def __init__(self, payload: memoryview) -> None:
        self.payload = payload
        self._view = payload[:0]

    def view(self, num_bytes: int) -> memoryview:
        """Return the first bytes of the payload; one object while the size stays."""
        if self._view.nbytes != num_bytes:
            self._view = self.payload[:num_bytes]
        return self._view


@dataclass(frozen=True, slots=True)
class Ring:
    """Shared memory of one direction.

    Frame n has header n modulo the number of slots, and beside it the index of the slot
    that holds its payload.

    Attributes:
        headers: 32 bytes each.
        slot_indices: One uint32 each.
        slots: One per header.
        num_freed: One uint64: how many frames the receiver is done with.
    """

    headers: tuple[memoryview, ...]
    slot_indices: tuple[memoryview, ...]
    slots: tuple[Slot, ...]
    num_freed: memoryview


#: What is left of a direction once its memory is gone.
NO_RING = Ring((), (), (), memoryview(b""))

_SelfT = TypeVar("_SelfT", bound="ChannelMemory")


class ChannelMemory:
    """Both rings of slots, their counters, and an eventfd for each counter's waiter.

    Args:
        layout: Number and payload bytes of the slots.
        descriptors: The memory and the eventfds; owned from here on.
    """

    def __init__(self, layout: SlotLayout, descriptors: list[int]) -> None:
        self._descriptors = descriptors
        try:
            self._map = mmap.mmap(descriptors[0], _total_bytes(layout))
        except (OSError, ValueError):
            _close_all(descriptors)
            raise
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        memory = memoryview(self._map)
        counts = [
            memory[i * _SIGNAL_STRIDE :][:8].cast("Q") for i in range(NUM_SIGNALS)
        ]
        headers, slots = NUM_SIGNALS * _SIGNAL_STRIDE, _control_bytes(layout)
        rings, places = [], []
        for num_bytes, count in (
            (layout.request_bytes, counts[1]),
            (layout.reply_bytes, counts[3]),
        ):
            stride = _pages(num_bytes)
            rings.append(
                _ring(memory, layout.num_slots, headers, slots, num_bytes, count)
            )
            places.append(
                RingPlace(
                    self._address + headers, self._address + slots, stride, num_bytes
                )
            )
            headers += layout.num_slots * _HEADER_STRIDE
            slots += layout.num_slots * stride
        self.requests, self.replies = rings
        self._places = places

    @classmethod
    def create(cls: type[_SelfT], layout: SlotLayout) -> _SelfT:
        """Allocate the memory; pages are taken as frames touch them.

        Raises:
            OSError: No memory, no descriptors, or a kernel without memfd.
        """
        descriptors: list[int] = []
        try:
            flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
            descriptors.append(os.memfd_create("vllm-attn-offload", flags))
            os.ftruncate(descriptors[0], _total_bytes(layout))
            fcntl.fcntl(descriptors[0], fcntl.F_ADD_SEALS, _SEALS)
            for _ in range(NUM_SIGNALS):
                descriptors.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError:
            _close_all(descriptors)
            raise
        return cls(layout, descriptors)

    def send_to(self, sock: socket.socket) -> None:
        """Pass the memory to a worker.

        Raises:
            OSError: The worker is gone.
        """
        socket.send_fds(sock, [b"\0"], self._descriptors)

    @classmethod
    def receive(
        cls: type[_SelfT], sock: socket.socket, layout: SlotLayout, timeout_s: float
    ) -> _SelfT:
        """Map the memory that a node passes through a Unix socket.

        Raises:
            OSError: The node is gone or too slow, or the memory cannot be mapped.
            ProtocolError: What came is not memory of this layout.
        """
        sock.settimeout(timeout_s)
        data, descriptors, _, _ = socket.recv_fds(
            sock, 1, 1 + NUM_SIGNALS, socket.MSG_CMSG_CLOEXEC
        )
        try:
            _check_descriptors(bytes(data), descriptors, layout)
        except (OSError, ProtocolError):
            _close_all(descriptors)
            raise
        return cls(layout, descriptors)

    def signal(self, index: int, sock: socket.socket, spin_ns: int) -> Signal:
        """Return the waiting or posting side of a counter, by its index."""
        address = self._address + index * _SIGNAL_STRIDE
        return Signal(
            counter=address,
            is_waiting=address + _IS_WAITING_OFFSET,
            doorbell=self._descriptors[1 + index],
            socket=sock.fileno(),
            spin_ns=spin_ns,
        )

    def channel(self, sock: socket.socket, spin_ns: int, *, is_node: bool) -> Channel:
        """Return one side of the channel, as the C library takes it.

        Args:
            sock: Shows that the peer is gone.
            spin_ns: Longest spin before a wait blocks.
            is_node: True for the node, which sends replies.
        """
        signals = [self.signal(i, sock, spin_ns) for i in range(NUM_SIGNALS)]
        requests, replies = signals[:2], signals[2:]
        (sent, freed), (received, released) = (
            (replies, requests) if is_node else (requests, replies)
        )
        places = self._places[::-1] if is_node else self._places
        channel = Channel(
            out_ring=places[0],
            in_ring=places[1],
            sent=sent,
            freed=freed,
            received=received,
            released=released,
        )
        channel.hold_no_slots(len(self.requests.slots))
        return channel

    def close(self) -> None:
        """Let go of the memory; it is unmapped once no view of a slot is left."""
        _close_all(self._descriptors)
        self._descriptors = []
        self.requests = self.replies = NO_RING
        with contextlib.suppress(AttributeError):
            del self._map


def _check_descriptors(data: bytes, descriptors: list[int], layout: SlotLayout) -> None:
    if not data:
        raise ConnectionResetError("the peer closed the connection")
    if len(descriptors) != 1 + NUM_SIGNALS:
        raise ProtocolError(f"{len(descriptors)} descriptors instead of shared memory")
    # A memory file that can shrink would end this process with SIGBUS.
    if not fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ProtocolError("shared memory that is not sealed against shrinking")
    if (size := os.fstat(descriptors[0]).st_size) != _total_bytes(layout):
        raise ProtocolError(
            f"{size:,} bytes of shared memory; {_total_bytes(layout):,} were announced"
        )


def _ring(
    memory: memoryview,
    num_slots: int,
    headers_begin: int,
    slots_begin: int,
    payload_bytes: int,
    num_freed: memoryview,
) -> Ring:
    places = range(
        headers_begin, headers_begin + num_slots * _HEADER_STRIDE, _HEADER_STRIDE
    )
    stride = _pages(payload_bytes)
    starts = range(slots_begin, slots_begin + num_slots * stride, stride)
    return Ring(
        headers=tuple(memory[place : place + FRAME_HEADER_BYTES] for place in places),
        slot_indices=tuple(
            memory[place + FRAME_HEADER_BYTES :][:4].cast("I") for place in places
        ),
        slots=tuple(Slot(memory[start : start + payload_bytes]) for start in starts),
        num_freed=num_freed,
    )


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _control_bytes(layout: SlotLayout) -> int:
    headers = 2 * layout.num_slots * _HEADER_STRIDE
    return _pages(NUM_SIGNALS * _SIGNAL_STRIDE + headers)


def _total_bytes(layout: SlotLayout) -> int:
    per_slot = _pages(layout.request_bytes) + _pages(layout.reply_bytes)
    return _control_bytes(layout) + layout.num_slots * per_slot


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
