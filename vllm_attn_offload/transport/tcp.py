# SPDX-License-Identifier: Apache-2.0
"""Frames over a connected stream socket: TCP between hosts, Unix sockets on one."""

from __future__ import annotations

import contextlib
import socket
import struct
import time

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.protocol import FRAME_HEADER_BYTES, FrameHeader
from vllm_attn_offload.transport.base import Transport

# Kernel time-outs keep a receive at one system call (settimeout adds a poll); a
# deadline is looked at once per tick.
_TICK_S = 0.5
_SOCKET_BUFFER_BYTES = 4 << 20


class TcpTransport(Transport):
    """A data channel over a stream socket.

    Args:
        sock: Connected TCP or Unix stream socket; owned from here on.
        stall_timeout_s: Longest pause of the peer inside a frame, in seconds.
    """

    def __init__(self, sock: socket.socket, *, stall_timeout_s: float) -> None:
        self._sock = sock
        self._stall_timeout_s = stall_timeout_s
        self._header_out = bytearray(FRAME_HEADER_BYTES)
        self._header_in = memoryview(bytearray(FRAME_HEADER_BYTES))
        self._payload = memoryview(bytearray(0))
        sock.setblocking(True)
        tick = struct.pack("@ll", 0, int(_TICK_S * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)
        if sock.family == socket.AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)

    def send(self, header: FrameHeader, *payload: memoryview) -> None:
        header.pack_into(self._header_out)
        sent = self._send_some([self._header_out, *payload])
        total = FRAME_HEADER_BYTES + header.num_bytes
        if sent < total:
            self._send_rest([memoryview(self._header_out), *payload], sent)

    def _send_some(self, buffers: list[bytearray | memoryview]) -> int:
        deadline = time.monotonic() + self._stall_timeout_s
        while True:
            try:
                return self._sock.sendmsg(buffers)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError("the peer takes no data") from None

    def _send_rest(self, buffers: list[memoryview], sent: int) -> None:
        while buffers:
            while buffers and sent >= buffers[0].nbytes:
                sent -= buffers.pop(0).nbytes
            if buffers:
                buffers[0] = buffers[0][sent:]
                sent = self._send_some(list(buffers))

    def receive_header(self, header: FrameHeader, timeout_s: float | None) -> None:
        self._receive_exactly(self._header_in, timeout_s)
        if not header.unpack_from(self._header_in):
            raise ProtocolError("what was received is not a frame of this protocol")

    def receive_payload(self, num_bytes: int) -> memoryview:
        if self._payload.nbytes < num_bytes:
            self._payload = memoryview(bytearray(num_bytes))
        view = self._payload[:num_bytes]
        self.receive_payload_into(view)
        return view

    def receive_payload_into(self, target: memoryview) -> None:
        self._receive_exactly(target, self._stall_timeout_s)

    def _receive_exactly(self, view: memoryview, timeout_s: float | None) -> None:
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

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
