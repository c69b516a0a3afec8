# SPDX-License-Identifier: Apache-2.0
"""An engine's control channel to one memory node."""

from __future__ import annotations

import select
import threading
from typing import TypeVar

import msgspec

from vllm_attn_offload.client.handshake import call, connect
from vllm_attn_offload.protocol.messages import (
    CapacityReserved,
    Closed,
    CloseSession,
    GetStats,
    NodeInfo,
    OpenSession,
    Ping,
    Pong,
    ReserveCapacity,
    SessionOpened,
    Stats,
)
from vllm_attn_offload.transport.control import hang_up
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

_ReplyT = TypeVar("_ReplyT", bound=msgspec.Struct)


class ControlClient:
    """Requests and replies with deadlines; what it reserves is freed when it closes.

    Args:
        address: The node, as the user wrote it.
        timeout_s: Deadline of every request.
        credentials: What to show the node, and to ask of it.

    Raises:
        MemoryNodeError: Nobody answers there, the versions differ, or one side does
            not trust the other.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._sock, self.info = connect(address, timeout_s, credentials)

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
        """Description of the node, and how much of it is free now."""
        self.info = self.stats().node
        return self.info

    def ping(self, timeout_s: float) -> None:
        """Check that the node answers within ``timeout_s`` seconds, also while it
        attends.

        Raises:
            MemoryNodeError: It does not.
        """
        self._call(Ping(), Pong, timeout_s)

    def wait_until_lost(self, timeout_s: float | None = None) -> bool:
        """Block until the node or ``close`` ends the connection, or time is up.

        Only the hang-up is polled for, so that replies stay for whoever asked.

        Returns:
            Whether the connection ended.
        """
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        return bool(poller.poll(None if timeout_s is None else timeout_s * 1000))

    def close(self) -> None:
        """End the channel; the node frees what this engine holds."""
        hang_up(self._sock)
        self._sock.close()

    def _call(
        self,
        request: msgspec.Struct,
        expected: type[_ReplyT],
        timeout_s: float | None = None,
    ) -> _ReplyT:
        deadline_s = timeout_s or self._timeout_s
        with self._lock:
            return call(self._sock, self.address, request, expected, deadline_s)
