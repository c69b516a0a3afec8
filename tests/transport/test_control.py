# SPDX-License-Identifier: Apache-2.0
"""Control messages over real sockets: limits, deadlines and broken peers."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.protocol.messages import Error, Hello, Ping, Reply, Request
from vllm_attn_offload.transport.control import (
    message_decoder,
    receive_message,
    send_message,
)

Pair = tuple[socket.socket, socket.socket]
LIMIT = 1 << 16
requests = message_decoder(Request)
replies = message_decoder(Reply)


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def receive(sock: socket.socket, timeout_s: float = 0.2) -> object:
    return receive_message(sock, requests, max_bytes=LIMIT, timeout_s=timeout_s)


def framed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def test_messages_keep_their_order(pair: Pair) -> None:
    ours, theirs = pair
    send_message(ours, Ping(), 1)
    send_message(ours, Error("x" * 4096), 1)
    assert receive(theirs) == Ping()
    reply = receive_message(theirs, replies, max_bytes=LIMIT, timeout_s=1)
    assert reply == Error("x" * 4096)


def test_receive_message_in_pieces(pair: Pair) -> None:
    ours, theirs = pair

    def trickle() -> None:
        for byte in framed(msgspec.msgpack.encode(Ping())):
            ours.sendall(bytes([byte]))
            time.sleep(0.002)

    thread = threading.Thread(target=trickle)
    thread.start()
    assert receive(theirs, timeout_s=5) == Ping()
    thread.join()


@pytest.mark.parametrize("sent", [b"", b"\x05", framed(b"12345")[:-1]])
def test_receive_message_deadline(pair: Pair, sent: bytes) -> None:
    ours, theirs = pair
    ours.sendall(sent)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        receive(theirs)
    assert 0.15 < time.monotonic() - started < 2


def test_receive_message_deadline_spans_the_message(pair: Pair) -> None:
    """A peer that sends a byte now and then does not move the deadline."""
    ours, theirs = pair
    is_over = threading.Event()

    def trickle() -> None:
        ours.sendall(struct.pack("<I", 1000))
        while not is_over.wait(0.05):
            ours.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(TimeoutError):
        receive(theirs, timeout_s=0.3)
    is_over.set()
    thread.join()


def test_receive_message_may_idle_longer(pair: Pair) -> None:
    ours, theirs = pair
    timer = threading.Timer(0.3, send_message, (ours, Ping(), 1))
    timer.start()
    message = receive_message(
        theirs, requests, max_bytes=LIMIT, timeout_s=0.1, idle_s=None
    )
    assert message == Ping()


def test_receive_message_too_long(pair: Pair) -> None:
    ours, theirs = pair
    ours.sendall(struct.pack("<I", LIMIT + 1))
    with pytest.raises(ProtocolError, match="65,537 bytes; at most 65,536 are allowed"):
        receive(theirs)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"GET / HTTP/1.1\r\n",
        b"\x81\xa4type\xa1\x80",
        10_000 * b"\x91",
        msgspec.msgpack.encode({"type": "no_such_message"}),
        msgspec.msgpack.encode({"type": "ping", "surplus": 1}),
        msgspec.msgpack.encode(Hello(1, "hash", "a reply to nothing")),
        msgspec.msgpack.encode({"type": "close_session", "reservation": "x" * 129}),
    ],
)
def test_receive_message_not_allowed(pair: Pair, payload: bytes) -> None:
    ours, theirs = pair
    ours.sendall(framed(payload))
    with pytest.raises(ProtocolError, match="not an allowed control message"):
        receive(theirs)


@pytest.mark.parametrize("sent", [b"", b"\x05\x00", framed(b"12345")[:-1]])
def test_receive_message_peer_closed(pair: Pair, sent: bytes) -> None:
    ours, theirs = pair
    ours.sendall(sent)
    ours.close()
    with pytest.raises(ConnectionResetError, match="closed the connection"):
        receive(theirs)


def test_send_message_peer_takes_nothing(pair: Pair) -> None:
    ours, _ = pair
    message = Error("x" * (4 << 20))
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        send_message(ours, message, 0.2)
    assert time.monotonic() - started < 2
