# SPDX-License-Identifier: Apache-2.0
"""Connected stream sockets with deadlines, and the one that needs no C library."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from abc import ABC, abstractmethod

# Kernel time-outs keep a call at one system call (settimeout adds a poll); a deadline
# is looked at once per tick.
_TICK_S = 0.5
_SOCKET_BUFFER_BYTES = 4 << 20
# A peer that is slower than this on average is as good as silent; as in wait.cpp.
_SLOWEST_BYTES_PER_S = 1e6
_DROPPED_BYTES = 256 << 10

#: Longest time for the peer to read what was sent before a connection is closed.
LONGEST_LINGER_S = 5.0
#: A receive ended while bytes still came.
PART_RECEIVED = "only a part was received in time: the peer sends too slowly"
SENT_TOO_SLOWLY = "the peer takes no data, or too slowly"


class ByteStream(ABC):
    """Bytes in both directions.

    One thread sends and one thread receives at a time; they may be different threads.
    Every call has a deadline for all of its bytes, which a peer that sends or takes
    them one at a time does not move.

    Args:
        sock: Connected stream socket; owned from here on.
        stall_timeout_s: Longest pause of the peer once bytes move, in seconds.
    """

    def __init__(self, sock: socket.socket, stall_timeout_s: float) -> None:
        self._sock = sock
        self._stall_timeout_s = stall_timeout_s

    @abstractmethod
    def send(self, buffers: list[memoryview]) -> None:
        """Send all bytes of the buffers, within the stall timeout and 1 s per MB.

        Args:
            buffers: Contiguous bytes ``[n]`` each; the list is used up.

        Raises:
            OSError: The peer is gone, or did not take the bytes in time.
        """

    @abstractmethod
    def receive_into(self, view: memoryview, timeout_s: float | None) -> None:
        """Fill a view, within ``timeout_s`` and 1 s per MB.

        Args:
            view: Contiguous bytes ``[num_bytes]``.
            timeout_s: Seconds to wait; None waits for ever for the first byte, and for
                the stall timeout from then on.

        Raises:
            ConnectionError: The peer closed the connection.
            TimeoutError: Nothing came in time, nothing more for the stall timeout, or
                not all in time.
        """

    def has_ended(self) -> bool:
        """Return True if either side has closed the connection; reads nothing."""
        return has_hung_up(self._sock)

    def linger(self) -> None:
        """Drop what the peer still sends, until it closes or for some seconds.

        A connection that is closed with bytes unread is reset, and the reset takes from
        the peer what was sent to it before.
        """
        end = time.monotonic() + min(self._stall_timeout_s, LONGEST_LINGER_S)
        poller = select.poll()
        # An SSLSocket's own methods look at what they drop.
        plain = socket.socket
        with contextlib.suppress(OSError, ValueError):
            plain.shutdown(self._sock, socket.SHUT_WR)
            poller.register(self._sock, select.POLLIN)
            while (left_s := end - time.monotonic()) > 0 and poller.poll(left_s * 1e3):
                if not plain.recv(self._sock, _DROPPED_BYTES):
                    return

    def close(self) -> None:
        """End the connection; wakes threads that wait in it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def has_hung_up(sock: socket.socket) -> bool:
    """Return True if a connection was closed, here or there; waits for nothing."""
    poller = select.poll()
    try:
        poller.register(sock, select.POLLRDHUP)
    except ValueError:  # closed here
        return True
    return bool(poller.poll(0))


class TransferDeadline:
    """End of one transfer: of the whole, and of each pause of the peer in it.

    Args:
        num_bytes: Bytes to transfer.
        timeout_s: Seconds until bytes move; None: any number, and the stall timeout is
            for the whole once they do.
        stall_timeout_s: Longest pause once bytes move, in seconds.
    """

    def __init__(
        self, num_bytes: int, timeout_s: float | None, stall_timeout_s: float
    ) -> None:
        self._transfer_s = num_bytes / _SLOWEST_BYTES_PER_S
        self._pause_s, self._stall_timeout_s = timeout_s, stall_timeout_s
        self._whole = self._pause_end = float("inf")
        if timeout_s is not None:
            self._pause_end = time.monotonic() + timeout_s
            self._whole = self._pause_end + self._transfer_s

    def note_progress(self) -> None:
        """Note that bytes just moved."""
        self._pause_s = self._stall_timeout_s
        self._pause_end = time.monotonic() + self._stall_timeout_s
        if self._whole == float("inf"):
            self._whole = self._pause_end + self._transfer_s

    def remaining_s(self) -> float | None:
        """Return the seconds that are left, 0 at least; None if any number."""
        end = min(self._whole, self._pause_end)
        return None if end == float("inf") else max(0.0, end - time.monotonic())

    def receive_error(self) -> TimeoutError:
        """Say what did not come in time."""
        if self._whole < self._pause_end:
            return TimeoutError(PART_RECEIVED)
        return TimeoutError(f"nothing received for {self._pause_s:.1f} s")


class BlockingStream(ByteStream):
    """Waits in ``sendmsg`` and ``recv_into``: one system call per send and receive."""

    def __init__(self, sock: socket.socket, stall_timeout_s: float) -> None:
        super().__init__(sock, stall_timeout_s)
        sock.setblocking(True)
        tick = struct.pack("@ll", 0, int(_TICK_S * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)
        if sock.family == socket.AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)

    def send(self, buffers: list[memoryview]) -> None:
        deadline = None
        while True:
            try:
                sent = self._sock.sendmsg(buffers)
            except BlockingIOError:
                sent = 0
            has_progress = sent > 0
            while buffers and sent >= buffers[0].nbytes:
                sent -= buffers.pop(0).nbytes
            if not buffers:
                return
            buffers[0] = buffers[0][sent:]
            if deadline is None:  # not before: most sends need none
                num_bytes = sum(buffer.nbytes for buffer in buffers)
                stall_s = self._stall_timeout_s
                deadline = TransferDeadline(num_bytes, stall_s - _TICK_S, stall_s)
            if has_progress:
                deadline.note_progress()
            if deadline.remaining_s() == 0:
                raise TimeoutError(SENT_TOO_SLOWLY)

    def receive_into(self, view: memoryview, timeout_s: float | None) -> None:
        deadline = TransferDeadline(view.nbytes, timeout_s, self._stall_timeout_s)
        received = 0
        while received < view.nbytes:
            try:
                count = self._sock.recv_into(view[received:], 0, socket.MSG_WAITALL)
                if count == 0:
                    raise ConnectionResetError("the peer closed the connection")
                received += count
                deadline.note_progress()
            except BlockingIOError:
                pass
            if received < view.nbytes and deadline.remaining_s() == 0:
                raise deadline.receive_error()
