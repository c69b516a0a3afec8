# SPDX-License-Identifier: Apache-2.0
"""An engine's control channel: nodes that are not there, silent, strange or lost."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

import pytest
from hostile_node import evil_stats
from node_process import NodeProcess

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.messages import (
    MAX_CONTROL_BYTES,
    Error,
    Hello,
    Pong,
)
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.control import (
    HANDSHAKE_TIMEOUT_S,
    message_decoder,
    receive_message,
    send_message,
)


def serve_once(behaviour: Callable[[socket.socket], None]) -> str:
    """Address of a peer that treats one connection as it likes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        with listener, sock:
            behaviour(sock)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def receive_hello(sock: socket.socket) -> None:
    decoder = message_decoder(Hello)
    assert receive_message(sock, decoder, max_bytes=4096, timeout_s=5)


def answer_at_length(sock: socket.socket) -> None:
    """More than is allowed, and what looks like another answer in the middle of it."""
    receive_hello(sock)
    send_message(sock, evil_stats().node, 5)
    sock.recv(1 << 10)
    sock.sendall((MAX_CONTROL_BYTES + 1).to_bytes(4, "little"))
    with contextlib.suppress(OSError):
        while sock.recv(1 << 10):
            send_message(sock, Pong(), 5)


def stay_silent(sock: socket.socket) -> None:
    receive_hello(sock)
    sock.recv(1)


def hang_up(sock: socket.socket) -> None:
    receive_hello(sock)


def answer_http(sock: socket.socket) -> None:
    sock.recv(1)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def answer_pong(sock: socket.socket) -> None:
    receive_hello(sock)
    send_message(sock, Pong(), 5)


def refuse(sock: socket.socket) -> None:
    receive_hello(sock)
    send_message(sock, Error("versions differ. Install the same."), 5)


def serve_through(node: NodeProcess, delay_s: float) -> str:
    """Address of a way to a node that keeps its first connection back."""
    listener = socket.create_server(("127.0.0.1", 0))
    parsed = Address.parse(node.address)

    def serve() -> None:
        for wait_s in (delay_s, 0):
            near, _ = listener.accept()
            far = parsed.connect(5)
            time.sleep(wait_s)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=pump, args=(source, sink), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(4096):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)


def test_a_late_handshake_is_tried_again(node: NodeProcess) -> None:
    """A node gives up on a peer that a busy host keeps from talking to it."""
    address = serve_through(node, HANDSHAKE_TIMEOUT_S + 0.5)
    with contextlib.closing(ControlClient(address, 20)) as client:
        client.ping(5)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (stay_silent, r"no answer to Hello within 0\.3 s"),
        (hang_up, "the connection broke: the peer closed the connection"),
        (answer_http, "the connection broke: "),
        (answer_pong, "Pong came in answer to Hello"),
        (refuse, "versions differ. Install the same."),
    ],
)
def test_connect_to_a_strange_peer(
    behaviour: Callable[[socket.socket], None], message: str
) -> None:
    address = serve_once(behaviour)
    started = time.monotonic()
    with pytest.raises(MemoryNodeError, match=message) as error:
        ControlClient(address, 0.3)
    assert time.monotonic() - started < 3
    assert error.value.node == address
    assert str(error.value).startswith(f"Memory node {address}: ")


def test_an_answer_that_is_too_long() -> None:
    """What follows it is no answer to the next request."""
    with contextlib.closing(ControlClient(serve_once(answer_at_length), 5)) as client:
        with pytest.raises(MemoryNodeError, match="a control message of 1,048,577"):
            client.stats()
        for _ in range(2):
            with pytest.raises(MemoryNodeError, match="the connection broke"):
                client.ping(5)
        assert client.wait_until_lost(5)


def test_connect_to_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(MemoryNodeError, match=r"cannot connect \(.*refused\)\. Check"):
        ControlClient(address, 1)


def test_close_ends_a_wait(node: NodeProcess) -> None:
    client = ControlClient(node.address, 5)
    waiter = threading.Thread(target=client.wait_until_lost, daemon=True)
    waiter.start()
    assert client.stats().node.pid == node.process.pid
    assert waiter.is_alive()
    client.close()
    waiter.join(5)
    assert not waiter.is_alive()


def test_node_is_killed(mortal_node: NodeProcess) -> None:
    client = ControlClient(mortal_node.address, 5)
    waiter = threading.Thread(target=client.wait_until_lost, daemon=True)
    waiter.start()
    mortal_node.kill()
    waiter.join(5)
    assert not waiter.is_alive()
    with pytest.raises(MemoryNodeError, match="the connection broke"):
        client.stats()
    client.close()
