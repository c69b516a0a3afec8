# SPDX-License-Identifier: Apache-2.0
"""Frames over Unix and TCP sockets: every size both ways, deadlines, broken peers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.protocol import FRAME_HEADER_BYTES, FrameHeader, FrameKind
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.tcp import TcpTransport

Channels = tuple[TcpTransport, TcpTransport]
STALL_TIMEOUT_S = 0.5


def socket_pair(kind: str) -> tuple[socket.socket, socket.socket]:
    if kind == "unix":
        return socket.socketpair()
    with Address(host="127.0.0.1").listen() as listener:
        port = listener.getsockname()[1]
        ours = Address(host="127.0.0.1", port=port).connect(timeout_s=5)
        return ours, listener.accept()[0]


@pytest.fixture(params=["unix", "tcp"])
def sockets(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket_pair(request.param)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def channels(sockets: tuple[socket.socket, socket.socket]) -> Channels:
    ours, theirs = (TcpTransport(s, stall_timeout_s=STALL_TIMEOUT_S) for s in sockets)
    return ours, theirs


def pattern(num_bytes: int, seed: int = 0) -> bytes:
    period = bytes((i * 7 + seed) % 251 for i in range(251))
    return (period * (num_bytes // 251 + 1))[:num_bytes]


def echo(channel: TcpTransport, num_frames: int) -> None:
    header = FrameHeader()
    for _ in range(num_frames):
        channel.receive_header(header, 5)
        channel.send(header, channel.receive_payload(header.num_bytes))


def test_frames_both_ways(channels: Channels) -> None:
    ours, theirs = channels
    sizes = [0, 1, 4 << 10, 8 << 20, 1, 0]
    thread = threading.Thread(target=echo, args=(theirs, len(sizes)))
    thread.start()
    received = FrameHeader()
    for number, size in enumerate(sizes):
        payload = pattern(size, number)
        sent = FrameHeader(
            FrameKind.LAYER,
            layer=number,
            step=(1 << 63) + number,
            micro_batch=2,
            group=3,
            flags=1,
            num_bytes=size,
        )
        ours.send(sent, memoryview(payload))
        ours.receive_header(received, 5)
        assert received == sent
        target = memoryview(bytearray(size))
        ours.receive_payload_into(target)
        assert target == payload
    thread.join()


def test_send_several_parts(channels: Channels) -> None:
    """The parts of a payload arrive as one, also where the kernel takes a bit."""
    ours, theirs = channels
    parts = [pattern(n, n) for n in (0, 5, 6 << 20, 0, 3, 6 << 20)]
    header = FrameHeader(FrameKind.OUT, num_bytes=sum(map(len, parts)))
    thread = threading.Thread(
        target=ours.send, args=(header, *(memoryview(part) for part in parts))
    )
    thread.start()
    received = FrameHeader()
    theirs.receive_header(received, 5)
    assert theirs.receive_payload(received.num_bytes) == b"".join(parts)
    thread.join()


def test_receive_header_deadline(channels: Channels) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nothing received for 0\.8 s"):
        channels[0].receive_header(FrameHeader(), 0.8)
    assert 0.7 < time.monotonic() - started < 3


@pytest.mark.parametrize("num_bytes", [1, FRAME_HEADER_BYTES + 9])
def test_receive_peer_stalls_in_a_frame(
    sockets: tuple[socket.socket, socket.socket], num_bytes: int
) -> None:
    frame = bytearray(FRAME_HEADER_BYTES + 10)
    FrameHeader(FrameKind.OUT, num_bytes=10).pack_into(frame)
    sockets[1].sendall(frame[:num_bytes])
    channel = TcpTransport(sockets[0], stall_timeout_s=STALL_TIMEOUT_S)
    header = FrameHeader()

    def receive() -> None:
        channel.receive_header(header, None)
        channel.receive_payload(header.num_bytes)

    with pytest.raises(TimeoutError):
        receive()


def test_receive_slow_peer(sockets: tuple[socket.socket, socket.socket]) -> None:
    """A frame may take longer than a stall, as long as something comes."""
    frame = bytearray(FRAME_HEADER_BYTES + 2)
    FrameHeader(FrameKind.OUT, num_bytes=2).pack_into(frame)

    def trickle() -> None:
        for begin in range(0, len(frame), 17):
            time.sleep(0.3)
            sockets[1].sendall(frame[begin : begin + 17])

    thread = threading.Thread(target=trickle)
    thread.start()
    channel = TcpTransport(sockets[0], stall_timeout_s=STALL_TIMEOUT_S)
    header = FrameHeader()
    channel.receive_header(header, 5)
    assert channel.receive_payload(header.num_bytes) == b"\x00\x00"
    thread.join()


def test_send_peer_takes_nothing(channels: Channels) -> None:
    payload = memoryview(bytes(64 << 20))
    with pytest.raises(TimeoutError, match="takes no data"):
        channels[0].send(FrameHeader(num_bytes=payload.nbytes), payload)


def test_receive_peer_closed(channels: Channels) -> None:
    ours, theirs = channels
    ours.send(FrameHeader(FrameKind.OUT, num_bytes=9), memoryview(b"12345"))
    ours.close()
    ours.close()
    header = FrameHeader()
    theirs.receive_header(header, 5)
    with pytest.raises(ConnectionResetError, match="closed the connection"):
        theirs.receive_payload(header.num_bytes)


def test_send_peer_closed(channels: Channels) -> None:
    ours, theirs = channels
    theirs.close()
    payload = memoryview(bytes(1 << 20))

    def send_all() -> None:
        for _ in range(16):
            ours.send(FrameHeader(num_bytes=payload.nbytes), payload)

    with pytest.raises(OSError, match="Broken pipe|reset by peer"):
        send_all()


def test_close_wakes_a_waiting_thread(channels: Channels) -> None:
    ours, _ = channels
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(OSError, match="closed|Bad file"):
            ours.receive_header(FrameHeader(), None)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    time.sleep(0.1)
    ours.close()
    assert ended.wait(2)


def test_receive_header_garbage(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].sendall(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n")
    channel = TcpTransport(sockets[0], stall_timeout_s=STALL_TIMEOUT_S)
    with pytest.raises(ProtocolError, match="not a frame of this protocol"):
        channel.receive_header(FrameHeader(), 5)
