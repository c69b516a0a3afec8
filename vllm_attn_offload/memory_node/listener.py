# SPDX-License-Identifier: Apache-2.0
"""Where a node accepts connections: TCP and Unix sockets, under one limit."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_attn_offload.memory_node.connections import (
    Connection,
    Connections,
    strangers,
)
from vllm_attn_offload.transport.address import Address, peer_name

logger = logging.getLogger(__name__)

_ACCEPT_RETRY_S = 0.2


class Listener:
    """Accepts connections and serves each in a thread of its own.

    Args:
        addresses: Where to listen, at least once.
        connections: Those of all addresses together.
        serve: Called with every admitted connection, which is closed when it returns.
        refused: Called for every connection for which there is no room.

    Attributes:
        addresses: ``addresses`` with the ports that were bound.

    Raises:
        OSError: An address cannot be bound; its ``filename`` is the address.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        connections: Connections,
        serve: Callable[[Connection], None],
        refused: Callable[[], None],
    ) -> None:
        self._serve = serve
        self._refused = refused
        self._connections = connections
        self._is_stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._socks: list[socket.socket] = []
        self.addresses: list[Address] = []
        try:
            for address in addresses:
                self._bind(address)
        except OSError:
            self.stop()
            raise

    @property
    def is_accepting(self) -> bool:
        """True while a thread waits for peers at every address."""
        return bool(self._threads) and all(each.is_alive() for each in self._threads)

    def start(self) -> None:
        """Accept connections in the background."""
        self._threads = [
            threading.Thread(
                target=self._accept, args=(sock,), name="accept", daemon=True
            )
            for sock in self._socks
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop listening and hang up on every peer."""
        self._is_stopping.set()
        for sock, address in zip(self._socks, self.addresses, strict=True):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            if address.path:
                Path(address.path).unlink(missing_ok=True)
        self._connections.end_all()

    def _bind(self, address: Address) -> None:
        try:
            sock = address.listen()
        except OSError as error:
            error.filename = str(address)
            raise
        port = 0 if address.path else sock.getsockname()[1]
        self._socks.append(sock)
        self.addresses.append(Address(address.host, port, address.path))

    def _accept(self, listening: socket.socket) -> None:
        is_short = False
        while not self._is_stopping.is_set():
            try:
                sock, _ = listening.accept()
                self._admit(sock)
                is_short = False
            except ConnectionAbortedError:
                continue
            except (OSError, RuntimeError) as error:
                # File descriptors, memory or threads ran out: those that serve go on,
                # and new peers wait in the backlog.
                if self._is_stopping.wait(_ACCEPT_RETRY_S):
                    return
                if not is_short:
                    logger.warning("cannot accept connections for now: %s", error)
                is_short = True

    def _admit(self, sock: socket.socket) -> None:
        try:
            peer = peer_name(sock)
            connection = self._connections.admit(sock, peer)
        except OSError as error:
            logger.debug("a connection ended at once: %s", error)
            sock.close()
            return
        if connection is None:
            self._refused()
            strangers.warning("refused a connection from %s: too many are in use", peer)
            sock.close()
            return
        try:
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()
        except RuntimeError:
            self._connections.remove(connection)
            sock.close()
            raise

    def _run(self, connection: Connection) -> None:
        try:
            self._serve(connection)
        finally:
            self._connections.remove(connection)
            connection.sock.close()
