# SPDX-License-Identifier: Apache-2.0
"""An engine's control channel to one memory node."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import TypeVar

import msgspec

from vllm_attn_offload.client.handshake import call, connect
from vllm_attn_offload.protocol import (
    CapacityReserved,
    Closed,
    CloseSession,
    GetStats,
    NodeInfo,
    OpenSession,
    ReserveCapacity,
    SessionOpened,
    Stats,
)

_ReplyT = TypeVar("_ReplyT", bound=msgspec.Struct)


class ControlClient:
    """Requests and replies with deadlines; what it reserves is freed when it closes.

    Args:
        address: The node, as the user wrote it.
        timeout_s: Deadline of every request.

    Raises:
        MemoryNodeError: Nobody answers there, or the versions differ.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._sock, self.info = connect(address, timeout_s)

    def reserve(self, request: ReserveCapacity) -> CapacityReserved:
        """Hold KV memory on the node."""
        return self._call(request, CapacityReserved)

    def open_session(self, request: OpenSession) -> SessionOpened:
        """Turn a reservation into a pool."""
        return self._call(request, SessionOpened)

    def close_session(self, reservation: str) -> None:
        """Free a reservation and its pool."""
        self._call(CloseSession(reservation), Closed)

    def stats(self) -> Stats:
        """Counters of the node and its sessions."""
        return self._call(GetStats(), Stats)

    def refresh_info(self) -> NodeInfo:
        """What the node is and how much of it is free now."""
        self.info = self.stats().node
        return self.info

    def wait_until_lost(self) -> None:
        """Block until the node or ``close`` ends the connection.

        Only the hang-up is polled for, so that replies stay for whoever asked.
        """
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        poller.poll()

    def close(self) -> None:
        """End the channel; the node frees what this engine holds."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _call(self, request: msgspec.Struct, expected: type[_ReplyT]) -> _ReplyT:
        with self._lock:
            return call(self._sock, self.address, request, expected, self._timeout_s)
