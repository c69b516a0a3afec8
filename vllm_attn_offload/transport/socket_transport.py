# SPDX-License-Identifier: Apache-2.0
"""Frames over a connected stream socket: TCP between hosts, Unix sockets on one."""

from __future__ import annotations

import socket
import ssl

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.frames import FRAME_HEADER_BYTES, FrameHeader
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.native_stream import NativeStream
from vllm_attn_offload.transport.streams import BlockingStream, ByteStream
from vllm_attn_offload.transport.tls_stream import TlsStream


class SocketTransport(Transport):
    """A data channel over a stream socket.

    Args:
        sock: Connected TCP, TLS or Unix stream socket; owned from here on.
        stall_timeout_s: Longest pause of the peer inside a frame, in seconds; a payload
            has 1 s per MB more.
        spin_us: Longest spin before a wait for a frame blocks; needs the C library.
    """

    def __init__(
        self, sock: socket.socket, *, stall_timeout_s: float, spin_us: int = 0
    ) -> None:
        self.name = _name(sock)
        self._stream = _open_stream(sock, stall_timeout_s, spin_us)
        self._stall_timeout_s = stall_timeout_s
        self._header_out = memoryview(bytearray(FRAME_HEADER_BYTES))
        self._header_in = memoryview(bytearray(FRAME_HEADER_BYTES))
        self._payload_out = _KeptBuffer()
        self._payload_in = _KeptBuffer()

    def payload_buffer(self, num_bytes: int) -> memoryview:
        return self._payload_out.view(num_bytes)

    def send(self, header: FrameHeader, *payload: memoryview) -> None:
        header.pack_into(self._header_out)
        self._stream.send([self._header_out, *payload])

    def receive_header(self, header: FrameHeader, timeout_s: float | None) -> None:
        self._stream.receive_into(self._header_in, timeout_s)
        if not header.unpack_from(self._header_in):
            raise ProtocolError("what was received is not a frame of this protocol")

    def receive_payload(self, num_bytes: int) -> memoryview:
        view = self._payload_in.view(num_bytes)
        self.receive_payload_into(view)
        return view

    def receive_payload_into(self, target: memoryview) -> None:
        self._stream.receive_into(target, self._stall_timeout_s)

    def has_ended(self) -> bool:
        return self._stream.has_ended()

    def linger(self) -> None:
        self._stream.linger()

    def close(self) -> None:
        self._stream.close()


class _KeptBuffer:
    """Memory that grows to the largest size asked for; a view per size in a row."""

    def __init__(self) -> None:
        self._memory = self._view = memoryview(bytearray(0))

    def view(self, num_bytes: int) -> memoryview:
        if self._view.nbytes != num_bytes:
            if self._memory.nbytes < num_bytes:
                self._memory = memoryview(bytearray(num_bytes))
            self._view = self._memory[:num_bytes]
        return self._view


def _open_stream(
    sock: socket.socket, stall_timeout_s: float, spin_us: int
) -> ByteStream:
    if isinstance(sock, ssl.SSLSocket):
        return TlsStream(sock, stall_timeout_s)
    waits = load_waits()
    if waits is None:
        return BlockingStream(sock, stall_timeout_s)
    return NativeStream(sock, stall_timeout_s, waits, spin_us)


def _name(sock: socket.socket) -> str:
    if isinstance(sock, ssl.SSLSocket):
        return "TLS"
    return "Unix socket" if sock.family == socket.AF_UNIX else "TCP"
