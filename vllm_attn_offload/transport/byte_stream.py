# SPDX-License-Identifier: Apache-2.0
"""The interface of a connected stream socket with deadlines."""

from __future__ import annotations

import contextlib
import socket
from abc import ABC, abstractmethod


class ByteStream(ABC):
    """Bytes in both directions.

    One thread sends and one thread receives at a time; they may be different threads.

    Args:
        sock: Connected stream socket; owned from here on.
        stall_timeout_s: Longest pause of the peer once bytes move, in seconds.
    """

    def __init__(self, sock: socket.socket, stall_timeout_s: float) -> None:
        self._sock = sock
        self._stall_timeout_s = stall_timeout_s

    @abstractmethod
    def send(self, buffers: list[memoryview]) -> None:
        """Send all bytes of the buffers; the list is used up.

        Raises:
            OSError: The peer is gone, or took nothing for the stall timeout.
        """

    @abstractmethod
    def receive_into(self, view: memoryview, timeout_s: float | None) -> None:
        """Fill a view.

        Args:
            view: Contiguous bytes.
            timeout_s: Seconds to wait for the first byte; None waits for ever.

        Raises:
            ConnectionError: The peer closed the connection.
            TimeoutError: Nothing came in time, or nothing more for the stall timeout.
        """

    def close(self) -> None:
        """End the connection; wakes threads that wait in it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
