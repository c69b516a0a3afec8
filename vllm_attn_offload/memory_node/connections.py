# SPDX-License-Identifier: Apache-2.0
"""The node's connections: accepted, bounded, and ended where others need room."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field

from vllm_attn_offload.transport.control import hang_up

logger = logging.getLogger(__name__)
#: For lines about peers that hold nothing; their number is limited.
strangers = logging.getLogger(f"{__name__}.strangers")

MAX_CONNECTIONS = 512
MAX_CONNECTIONS_PER_PEER = 384
#: Engines send heartbeats from the moment they join, far more often than that.
_ABANDONED_S = 120.0


@dataclass(slots=True, eq=False)
class Connection:
    """A peer that was accepted.

    ``peer`` is its host, or its user where it came over a Unix socket. ``is_admitted``
    says that the handshake is over, ``has_asked`` that a request came after it.
    ``reservations`` are freed with the connection, whose ``engine_id`` is its own.
    """

    sock: socket.socket
    peer: str
    last_active: float = field(default_factory=time.monotonic)
    reservations: list[str] = field(default_factory=list)
    engine_id: str = field(default_factory=lambda: secrets.token_hex(8))
    is_admitted: bool = False
    has_asked: bool = False
    is_data_channel: bool = False

    @property
    def is_in_use(self) -> bool:
        """True if an engine would lose something with it."""
        if self.is_data_channel or self.reservations:
            return True
        silent_s = time.monotonic() - self.last_active
        return self.has_asked and silent_s < _ABANDONED_S

    @property
    def log(self) -> logging.Logger:
        """Logger of lines about the peer, which cannot crowd out those of engines."""
        return logger if self.reservations else strangers

    def note_request(self) -> None:
        """Note that the peer just asked something; engines do from the start."""
        self.has_asked = True
        self.last_active = time.monotonic()


class Connections:
    """Bounds connections in total and per peer; safe for concurrent callers.

    Where there is no room, a connection that holds nothing and sends no heartbeats
    ends: one that is not admitted before one that is, and then the one that was silent
    for longest. Idle peers, however many, keep no engine out and end none.

    Args:
        max_total: Connections at a time.
        max_per_peer: Of these, from one peer.
    """

    def __init__(
        self,
        max_total: int = MAX_CONNECTIONS,
        max_per_peer: int = MAX_CONNECTIONS_PER_PEER,
    ) -> None:
        self._max_total = max_total
        self._max_per_peer = max_per_peer
        self._open: set[Connection] = set()
        self._num_served = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)

    def admit(self, sock: socket.socket, peer: str) -> Connection | None:
        """Register a connection, or None where there is no room for it."""
        with self._lock:
            # Those that made room are still served until their thread notices.
            if self._num_served >= 2 * self._max_total or not self._make_room(peer):
                return None
            connection = Connection(sock, peer)
            self._open.add(connection)
            self._num_served += 1
            return connection

    def remove(self, connection: Connection) -> None:
        """Forget an admitted connection, once."""
        with self._lock:
            self._open.discard(connection)
            self._num_served -= 1

    def end_all(self) -> None:
        """Hang up on everybody."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            hang_up(connection.sock)

    def _make_room(self, peer: str) -> bool:
        from_peer = [c for c in self._open if c.peer == peer]
        if len(from_peer) >= self._max_per_peer:
            return self._end_idlest(from_peer)
        if len(self._open) >= self._max_total:
            return self._end_idlest(list(self._open))
        return True

    def _end_idlest(self, candidates: list[Connection]) -> bool:
        idle = [c for c in candidates if not c.is_in_use]
        if not idle:
            return False
        idlest = min(idle, key=lambda c: (c.is_admitted, c.last_active))
        self._open.discard(idlest)
        strangers.warning(
            "closed a connection of %s to make room: it holds nothing and was silent "
            "for %.0f s",
            idlest.peer,
            time.monotonic() - idlest.last_active,
        )
        hang_up(idlest.sock)
        return True
