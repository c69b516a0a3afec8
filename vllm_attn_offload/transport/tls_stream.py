# SPDX-License-Identifier: Apache-2.0
"""A TLS socket on which one thread may send while another receives."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading

from vllm_attn_offload.transport.streams import (
    SENT_TOO_SLOWLY,
    ByteStream,
    TransferDeadline,
)

_RECORD_BYTES = 16 << 10


class TlsStream(ByteStream):
    """Short non-blocking TLS calls under a lock; the waits between them are outside.

    OpenSSL allows one thread at a time inside a connection.

    Args:
        sock: Connected TLS socket, its handshake done; owned from here on.
        stall_timeout_s: Longest pause of the peer once bytes move, in seconds.
    """

    def __init__(self, sock: ssl.SSLSocket, stall_timeout_s: float) -> None:
        super().__init__(sock, stall_timeout_s)
        self._tls = sock
        self._lock = threading.Lock()
        sock.setblocking(False)

    def send(self, buffers: list[memoryview]) -> None:
        num_bytes = sum(buffer.nbytes for buffer in buffers)
        if num_bytes <= _RECORD_BYTES:
            buffers = [memoryview(b"".join(buffers))]
        stall_s = self._stall_timeout_s
        deadline = TransferDeadline(num_bytes, stall_s, stall_s)
        for buffer in buffers:
            self._send_all(buffer, deadline)

    def _send_all(self, view: memoryview, deadline: TransferDeadline) -> None:
        while view.nbytes:
            try:
                with self._lock:
                    sent = self._tls.send(view)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as want:
                if not self._is_ready(want, deadline):
                    raise TimeoutError(SENT_TOO_SLOWLY) from None
                continue
            except ssl.SSLError as error:
                raise ConnectionResetError(f"TLS failed: {error}") from error
            view = view[sent:]
            deadline.note_progress()
            if view.nbytes and deadline.remaining_s() == 0:
                raise TimeoutError(SENT_TOO_SLOWLY)

    def receive_into(self, view: memoryview, timeout_s: float | None) -> None:
        deadline = TransferDeadline(view.nbytes, timeout_s, self._stall_timeout_s)
        while view.nbytes:
            try:
                with self._lock:
                    count = self._tls.recv_into(view)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as want:
                if not self._is_ready(want, deadline):
                    raise deadline.receive_error() from None
                continue
            except ssl.SSLError as error:
                raise ConnectionResetError(f"TLS failed: {error}") from error
            if not count:
                raise ConnectionResetError("the peer closed the connection")
            view = view[count:]
            deadline.note_progress()
            if view.nbytes and deadline.remaining_s() == 0:
                raise deadline.receive_error()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            # Not SSLSocket's own: that turns into a plain socket for other threads.
            socket.socket.shutdown(self._tls, socket.SHUT_RDWR)
        with self._lock:
            self._tls.close()

    def _is_ready(self, want: ssl.SSLError, deadline: TransferDeadline) -> bool:
        """Wait for what TLS wants; False when the deadline passed."""
        remaining_s = deadline.remaining_s()
        if remaining_s == 0:
            return False
        poll = select.poll()
        is_read = isinstance(want, ssl.SSLWantReadError)
        poll.register(self._tls, select.POLLIN if is_read else select.POLLOUT)
        return bool(poll.poll(None if remaining_s is None else remaining_s * 1000))
