# SPDX-License-Identifier: Apache-2.0
"""Frames through shared memory; the Unix socket beside it shows that the peer lives."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.native.waits import (
    INTERRUPTED,
    READY,
    TIMED_OUT,
    NativeWaits,
    Signal,
    milliseconds,
)
from vllm_attn_offload.protocol.frames import FrameHeader
from vllm_attn_offload.protocol.messages import SlotLayout
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.channel_memory import (
    NO_RING,
    NUM_SIGNALS,
    ChannelMemory,
    Slot,
)
from vllm_attn_offload.transport.cuda_memory import DeviceMemory
from vllm_attn_offload.transport.streams import has_hung_up

_NOTHING_CAME = "nothing received for {:.1f} s"
_NOTHING_TAKEN = "the peer takes no data"


@dataclass(frozen=True, slots=True)
class ChannelSetup:
    """One side of a channel through memory that both sides map.

    Attributes:
        sock: Unix socket of the attachment; owned by the transport, and unused
            otherwise.
        memory: Slots and counters; owned by the transport.
        waits: The C library.
        rows: Device memory beside the slots, owned by the transport; None: there is
            none.
        rows_layout: Its slots, as many as ``memory`` has.
        is_node: True for the node, which sends replies; workers send requests.
        stall_timeout_s: Longest wait for a free slot, in seconds.
        spin_us: Longest spin before a wait blocks.
    """

    sock: socket.socket
    memory: ChannelMemory
    waits: NativeWaits
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
        memory, spin_ns = setup.memory, setup.spin_us * 1000
        self._sock, self._memory = setup.sock, memory
        self._stall_timeout_s = setup.stall_timeout_s
        self._wait_for, self._post = setup.waits.wait, setup.waits.post
        signals = [memory.signal(i, setup.sock, spin_ns) for i in range(NUM_SIGNALS)]
        requests, replies = signals[:2], signals[2:]
        ours, theirs = (replies, requests) if setup.is_node else (requests, replies)
        self._sent, self._freed = ours
        self._received, self._released = theirs
        self._sent_ref = ctypes.byref(self._sent)
        self._released_ref = ctypes.byref(self._released)
        rings = memory.replies, memory.requests
        self._out, self._in = rings if setup.is_node else rings[::-1]
        self._num_slots = len(self._out.slots)
        self._num_sent = self._num_freed = self._num_received = 0
        self._free = list(range(self._num_slots))
        self._held: deque[int] = deque()  # slots of frames that are not freed, in order
        self._taken: int | None = None
        self._lent: memoryview | None = None
        self._current: Slot | None = None
        self._current_index = 0
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
            place = self._num_sent % self._num_slots
            header.pack_into(self._out.headers[place])
            self._out.slot_indices[place][0] = index
            self._held.append(index)
            self._taken = None
            self._num_sent += 1
            self._post(self._sent_ref)
        finally:
            self._is_sending = False
            if self._is_closed:
                self._release()

    def receive_header(self, header: FrameHeader, timeout_s: float | None) -> None:
        self._is_receiving = True
        try:
            slot = self._next_slot(header, timeout_s)
        finally:
            self._is_receiving = False
            if self._is_closed:
                self._release()
        if header.num_bytes > slot.payload.nbytes:
            raise ProtocolError(
                f"a frame of {header.num_bytes:,} bytes; at most "
                f"{slot.payload.nbytes:,} fit this channel"
            )

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
        if self._taken is None:
            # Writes to a slot depend on this read: no processor moves them before it.
            self._note_freed(self._out.num_freed[0])
            if not self._free:
                target = self._num_freed + 1
                self._wait(self._freed, target, self._stall_timeout_s, _NOTHING_TAKEN)
                self._note_freed(target)
            self._taken = self._free.pop()
        return self._taken

    def _note_freed(self, num_freed: int) -> None:
        # A peer that counts wrongly frees no slot but those in use.
        while self._num_freed < num_freed and self._held:
            self._free.append(self._held.popleft())
            self._num_freed += 1

    def _next_slot(self, header: FrameHeader, timeout_s: float | None) -> Slot:
        if self._is_closed:
            raise ConnectionResetError("the channel was closed")
        if self._current is not None:
            self._current = None
            self._post(self._released_ref)
        target = self._num_received + 1
        if self._received.seen < target:
            self._wait(self._received, target, timeout_s, _NOTHING_CAME)
            if self._received.seen >= target + self._num_slots:
                raise ProtocolError("more frames were announced than there are slots")
        place = self._num_received % self._num_slots
        index = self._in.slot_indices[place][0]
        if index >= self._num_slots or not header.unpack_from(self._in.headers[place]):
            raise ProtocolError("what was received is not a frame of this protocol")
        self._num_received = target
        self._current_index = index
        self._current = self._in.slots[index]
        return self._current

    def _current_slot(self) -> Slot:
        slot = self._current
        if slot is None:
            raise ConnectionResetError("the channel was closed")
        return slot

    def _wait(
        self, signal: Signal, target: int, timeout_s: float | None, problem: str
    ) -> None:
        signal.target = target
        reference: Any = ctypes.byref(signal)
        started = time.monotonic()
        status = self._wait_for(reference, milliseconds(timeout_s))
        if status == READY:
            return
        while status == INTERRUPTED and not self._is_closed:
            # Signal handlers have run here, and one may have closed the channel.
            left_s = timeout_s
            if left_s is not None:
                left_s = max(0.0, left_s - (time.monotonic() - started))
            status = self._wait_for(reference, milliseconds(left_s))
        if status == TIMED_OUT:
            raise TimeoutError(problem.format(timeout_s))
        if status != READY or self._is_closed:
            raise ConnectionResetError("the peer closed the connection")


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
