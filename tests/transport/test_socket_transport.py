# SPDX-License-Identifier: Apache-2.0
"""Frames over Unix and TCP sockets: stalls, broken peers, each way of waiting."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from channel_pairs import Sockets, pattern, tcp_pair, tls_pair

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.frames import FRAME_HEADER_BYTES, FrameHeader, FrameKind
from vllm_attn_offload.transport.native_stream import NativeStream
from vllm_attn_offload.transport.socket_transport import SocketTransport
from vllm_attn_offload.transport.streams import BlockingStream, ByteStream
from vllm_attn_offload.transport.tls_stream import TlsStream

STALL_TIMEOUT_S = 0.5

MakeStream = Callable[[socket.socket], ByteStream]


def native_stream(sock: socket.socket) -> ByteStream:
    waits = load_waits()
    if waits is None:
        pytest.skip("the C library is not built")
    return NativeStream(sock, STALL_TIMEOUT_S, waits, spin_us=50)


def blocking_stream(sock: socket.socket) -> ByteStream:
    return BlockingStream(sock, STALL_TIMEOUT_S)


def tls_stream(sock: socket.socket) -> ByteStream:
    return TlsStream(sock, STALL_TIMEOUT_S)


@pytest.fixture(params=["unix", "tcp"])
def sockets(request: pytest.FixtureRequest) -> Iterator[Sockets]:
    ours, theirs = socket.socketpair() if request.param == "unix" else tcp_pair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(params=[native_stream, blocking_stream, tls_stream])
def stream(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ByteStream, socket.socket]]:
    """A stream and the socket of its peer."""
    is_tls = request.param is tls_stream
    ours, theirs = tls_pair(tmp_path_factory.getbasetemp()) if is_tls else tcp_pair()
    made = request.param(ours)
    yield made, theirs
    made.close()
    theirs.close()


def test_stream_receive_slow_peer(stream: tuple[ByteStream, socket.socket]) -> None:
    """Bytes may take longer than a stall, as long as some come."""
    ours, theirs = stream

    def trickle() -> None:
        for begin in range(0, 34, 4):
            time.sleep(0.08)
            theirs.sendall(pattern(34)[begin : begin + 4])

    thread = threading.Thread(target=trickle)
    thread.start()
    target = memoryview(bytearray(34))
    ours.receive_into(target, 5)
    assert target == pattern(34)
    thread.join()


def test_stream_receive_peer_stalls(stream: tuple[ByteStream, socket.socket]) -> None:
    ours, theirs = stream
    theirs.sendall(b"12345")
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nothing received for 0\.5 s"):
        ours.receive_into(memoryview(bytearray(6)), None)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("timeout_s", [1.0, None])
def test_stream_receive_trickle(
    stream: tuple[ByteStream, socket.socket], timeout_s: float | None
) -> None:
    """A peer that sends a byte now and then does not move the deadline of the whole."""
    ours, theirs = stream
    num_bytes, num_sent, is_over = 10_000, 0, threading.Event()

    def trickle() -> None:
        nonlocal num_sent
        while num_sent < num_bytes and not is_over.wait(0.02):  # 200 s
            theirs.sendall(b"x")
            num_sent += 1

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="only a part was received in time"):
            ours.receive_into(memoryview(bytearray(num_bytes)), timeout_s)
        assert thread.is_alive()
    finally:
        is_over.set()
        thread.join()
    assert num_sent < num_bytes / 2


def test_stream_send_to_a_slow_peer(stream: tuple[ByteStream, socket.socket]) -> None:
    """Nor does one that takes a little now and then."""
    ours, theirs = stream
    num_bytes, num_taken, is_over = 1 << 20, 0, threading.Event()

    def sip() -> None:
        nonlocal num_taken
        while not is_over.wait(0.02):
            num_taken += len(theirs.recv(1 << 10))

    def send_all() -> None:
        for _ in range(64):  # more than the kernel holds
            ours.send([memoryview(bytes(num_bytes))])

    thread = threading.Thread(target=sip)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="takes no data, or too slowly"):
            send_all()
    finally:
        is_over.set()
        thread.join()
    assert num_taken < 32 * num_bytes


def test_stream_receive_peer_closed(stream: tuple[ByteStream, socket.socket]) -> None:
    ours, theirs = stream
    theirs.sendall(b"12345")
    theirs.close()
    with pytest.raises(ConnectionError, match="closed the connection"):
        ours.receive_into(memoryview(bytearray(6)), 5)


def test_stream_send_more_than_the_kernel_takes(
    stream: tuple[ByteStream, socket.socket],
) -> None:
    ours, theirs = stream
    parts = [pattern(n, n) for n in (7, 0, 6 << 20, 6 << 20, 1)]
    thread = threading.Thread(target=ours.send, args=([*map(memoryview, parts)],))
    thread.start()
    received = bytearray()
    while len(received) < sum(map(len, parts)):
        received += theirs.recv(1 << 20)
    assert received == b"".join(parts)
    thread.join()


def test_stream_close_wakes_a_waiting_thread(
    stream: tuple[ByteStream, socket.socket],
) -> None:
    ours, _ = stream
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(OSError, match="closed|Bad file"):
            ours.receive_into(memoryview(bytearray(1)), None)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    time.sleep(0.1)
    ours.close()
    assert ended.wait(2)


@pytest.mark.parametrize("num_bytes", [1, FRAME_HEADER_BYTES + 9])
def test_receive_peer_stalls_in_a_frame(sockets: Sockets, num_bytes: int) -> None:
    frame = bytearray(FRAME_HEADER_BYTES + 10)
    FrameHeader(FrameKind.OUT, num_bytes=10).pack_into(frame)
    sockets[1].sendall(frame[:num_bytes])
    channel = SocketTransport(sockets[0], stall_timeout_s=STALL_TIMEOUT_S)
    header = FrameHeader()

    def receive() -> None:
        channel.receive_header(header, None)
        channel.receive_payload(header.num_bytes)

    with pytest.raises(TimeoutError):
        receive()


def test_receive_peer_closed_in_a_payload(sockets: Sockets) -> None:
    ours, theirs = (
        SocketTransport(s, stall_timeout_s=STALL_TIMEOUT_S) for s in sockets
    )
    ours.send(FrameHeader(FrameKind.OUT, num_bytes=9), memoryview(b"12345"))
    ours.close()
    header = FrameHeader()
    theirs.receive_header(header, 5)
    with pytest.raises(ConnectionResetError, match="closed the connection"):
        theirs.receive_payload(header.num_bytes)


def test_receive_header_garbage(sockets: Sockets) -> None:
    sockets[1].sendall(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n")
    channel = SocketTransport(sockets[0], stall_timeout_s=STALL_TIMEOUT_S)
    with pytest.raises(ProtocolError, match="not a frame of this protocol"):
        channel.receive_header(FrameHeader(), 5)


def test_sockets_of_tls_are_encrypted(tmp_path: Path) -> None:
    ours, theirs = tls_pair(tmp_path)
    channel = SocketTransport(ours, stall_timeout_s=STALL_TIMEOUT_S)
    raw = socket.socket(fileno=theirs.detach())
    channel.send(FrameHeader(num_bytes=9), memoryview(b"plaintext"))
    assert b"plaintext" not in raw.recv(1 << 10)
    channel.close()
    raw.close()
