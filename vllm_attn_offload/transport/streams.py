# SPDX-License-Identifier: Apache-2.0
"""A stream socket that blocks in the kernel: one system call per send and receive."""

from __future__ import annotations

import socket
import struct
import time

from vllm_attn_offload.transport.byte_stream import ByteStream

# Kernel time-outs keep a call at one system call (settimeout adds a poll); a deadline
# is looked at once per tick.
_TICK_S = 0.5
_SOCKET_BUFFER_BYTES = 4 << 20


class BlockingStream(ByteStream):
    """Waits in ``sendmsg`` and ``recv_into``; needs no C library."""

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
        while buffers:
            sent = self._send_some(buffers)
            while buffers and sent >= buffers[0].nbytes:
                sent -= buffers.pop(0).nbytes
            if sent:
                buffers[0] = buffers[0][sent:]

    def _send_some(self, buffers: list[memoryview]) -> int:
        deadline = None
        while True:
            try:
                return self._sock.sendmsg(buffers)
            except BlockingIOError:
                now = time.monotonic()
                deadline = deadline or now + self._stall_timeout_s - _TICK_S
                if now >= deadline:
                    raise TimeoutError("the peer takes no data") from None

    def receive_into(self, view: memoryview, timeout_s: float | None) -> None:
        received = 0
        deadline = None
        while received < view.nbytes:
            try:
                count = self._sock.recv_into(view[received:], 0, socket.MSG_WAITALL)
            except BlockingIOError:
                now = time.monotonic()
                if deadline is None and timeout_s is not None:
                    deadline = now + timeout_s - _TICK_S
                if deadline is not None and now >= deadline:
                    raise TimeoutError(
                        f"nothing received for {timeout_s:.1f} s"
                    ) from None
                continue
            if count == 0:
                raise ConnectionResetError("the peer closed the connection")
            received += count
            if received < view.nbytes:
                timeout_s, deadline = self._stall_timeout_s, None
