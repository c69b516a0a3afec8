# SPDX-License-Identifier: Apache-2.0
"""A session whose worker writes to the shared memory as it likes."""

from __future__ import annotations

import ctypes
import os
import time

import msgspec
from raw_session import TIMEOUT_S, attach_request, reservation, session_of
from real_frames import GEOMETRY, NUM_BLOCKS

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.handshake import call, connect
from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.frames import FRAME_HEADER_BYTES, FrameHeader
from vllm_attn_offload.protocol.messages import Attached, ChannelOffer
from vllm_attn_offload.transport.channel_memory import NUM_SIGNALS, ChannelMemory

#: Counters, headers and slot indices, of which the other side reads some.
CONTROL_BYTES = 1 << 10
_SENT, _, _REPLIED, _TAKEN = range(NUM_SIGNALS)
_MASK = (1 << 64) - 1


class SharedSession:
    """Reserved, opened and attached through shared memory.

    Args:
        address: The memory node, on a Unix socket.
    """

    def __init__(self, address: str) -> None:
        self.control = ControlClient(address, TIMEOUT_S)
        kv_bytes = NUM_BLOCKS * 2 * 2 * 2 * 16 * 16 * 4
        reserved = self.control.reserve(reservation(GEOMETRY, kv_bytes))
        opened = self.control.open_session(session_of(reserved.reservation, NUM_BLOCKS))
        self._sock, _ = connect(address, TIMEOUT_S)
        request = msgspec.structs.replace(
            attach_request(opened, GEOMETRY), offer=ChannelOffer([0], 1, True)
        )
        attached = call(self._sock, address, request, Attached, TIMEOUT_S)
        assert attached.shared_memory is not None
        layout = attached.shared_memory
        self.num_slots = layout.num_slots
        self._memory = ChannelMemory.receive(self._sock, layout, TIMEOUT_S)
        waits = load_waits()
        assert waits is not None
        self._post = waits.post
        self._signals = [
            self._memory.signal(index, self._sock, 0) for index in range(NUM_SIGNALS)
        ]
        # All replies are taken before they come: the node never waits for a slot.
        self.count(_TAKEN, 1 << 60)
        self.num_sent = 0

    def send(self, frame: bytes, place: int, slot: int) -> None:
        """Announce a frame, whatever it is and wherever it is claimed to lie."""
        header = frame[:FRAME_HEADER_BYTES].ljust(FRAME_HEADER_BYTES, b"\0")
        requests = self._memory.requests
        requests.headers[place][:] = header
        requests.slot_indices[place][0] = slot & 0xFFFFFFFF
        self.write(slot % self.num_slots, 0, frame[FRAME_HEADER_BYTES:])
        self.num_sent += 1
        self.count(_SENT, self.num_sent)

    def send_right(self, frame: bytes) -> None:
        """Send as a worker does; waits for a slot."""
        ends = time.monotonic() + TIMEOUT_S
        while self._memory.requests.num_freed[0] + self.num_slots <= self.num_sent:
            assert time.monotonic() < ends, "the node frees no slot"
            time.sleep(0.0002)
        place = self.num_sent % self.num_slots
        self.send(frame, place, place)

    def count(self, which: int, value: int) -> None:
        """Set one of the four counters, and wake its waiter."""
        self._signals[which].posted = (value - 1) & _MASK
        self._post(ctypes.byref(self._signals[which]))

    def write(self, slot: int, offset: int, data: bytes) -> None:
        """Overwrite bytes of a request's slot, also while the node reads it."""
        payload = self._memory.requests.slots[slot].payload
        offset %= payload.nbytes
        data = data[: payload.nbytes - offset]
        payload[offset : offset + len(data)] = data

    def scribble(self, offset: int, data: bytes) -> None:
        """Overwrite bytes of the memory's control part."""
        data = data[: CONTROL_BYTES - offset]
        ctypes.memmove(self._signals[0].counter + offset, data, len(data))

    def last_kinds(self, num_replies: int) -> list[int]:
        """Kinds of the last replies once there are so many; their slots are reused."""
        ends = time.monotonic() + TIMEOUT_S
        counter = ctypes.c_uint64.from_address(self._signals[_REPLIED].counter)
        while counter.value < num_replies:
            assert time.monotonic() < ends, f"{counter.value} replies only"
            time.sleep(0.001)
        header = FrameHeader()
        return [
            header.kind
            for place in self._memory.replies.headers
            if header.unpack_from(place)
        ]

    def close(self) -> None:
        """Wake the node whatever it waits for, and leave."""
        for signal in self._signals:
            os.write(signal.doorbell, (1).to_bytes(8, "little"))
        self._sock.close()
        self._memory.close()
        self.control.close()
