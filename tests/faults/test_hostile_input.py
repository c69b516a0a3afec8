# SPDX-License-Identifier: Apache-2.0
"""Peers that flood, dawdle or send nonsense, beside a session that must not notice."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import msgspec
import psutil
import pytest
from busy_session import BusySession
from node_process import NodeProcess, eventually
from raw_session import make_geometry, reservation, session_of

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.handshake import connect
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.messages import (
    CloseSession,
    GetStats,
    Hello,
    OpenSession,
)
from vllm_attn_offload.transport.address import Address

StartNode = Callable[..., NodeProcess]
MIB = 1 << 20
NUM_PEERS = 1000
MAX_GROWTH_BYTES = 128 * MIB


@pytest.fixture(autouse=True, scope="module")
def _many_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3 * NUM_PEERS:
        pytest.skip(f"needs {3 * NUM_PEERS} file descriptors; {hard} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3 * NUM_PEERS), hard))


@pytest.fixture
def busy(node: NodeProcess) -> Iterator[BusySession]:
    """A session that has to make progress all the time, with right outputs."""
    process = psutil.Process(node.process.pid)
    session = BusySession(node.address)
    assert eventually(lambda: session.num_steps > 3, 30)
    before = process.memory_info().rss
    started = session.num_steps
    yield session
    assert eventually(lambda: session.num_steps > started + 3, 30)
    assert process.memory_info().rss - before < MAX_GROWTH_BYTES
    session.stop()


def ends(sock: socket.socket, timeout_s: float) -> bool:
    """Whether the node hangs up in time."""
    sock.settimeout(timeout_s)
    with suppress(ConnectionError):
        while sock.recv(4096):
            continue
    return True


def test_silent_connections(node: NodeProcess, busy: BusySession) -> None:
    """They keep no engine out, and end without having said a word."""
    address = Address.parse(node.address)
    with ExitStack() as stack:
        peers = [stack.enter_context(address.connect(10)) for _ in range(NUM_PEERS)]
        with closing(ControlClient(node.address, 5)) as client:
            assert client.stats().node.pid == node.process.pid
        assert all(ends(peer, 15) for peer in peers)


def test_idle_connections(node: NodeProcess, busy: BusySession) -> None:
    """Greeted and idle: the oldest make room; those that hold memory stay."""
    with ExitStack() as stack, closing(ControlClient(node.address, 5)) as owner:
        reserved = owner.reserve(reservation(make_geometry(), MIB))
        for _ in range(NUM_PEERS):
            sock, _ = connect(node.address, 10)
            stack.enter_context(sock)
        newest, _ = connect(node.address, 10)
        stack.enter_context(newest)
        assert psutil.Process(node.process.pid).num_fds() < 2 * 512
        owner.close_session(reserved.reservation)


def test_slow_hello(node: NodeProcess, busy: BusySession) -> None:
    """A byte now and then does not keep a connection."""
    with Address.parse(node.address).connect(5) as sock:
        started = time.monotonic()
        sock.settimeout(0.3)
        sock.sendall(b"\x40\x00\x00\x00")
        is_over = False
        while not is_over and time.monotonic() - started < 20:
            with suppress(TimeoutError):
                is_over = not sock.recv(1)
            with suppress(OSError):
                sock.sendall(b"\x80")
        assert is_over


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00" * 4096,
        b"\xff" * 4096,
        b"\xff\xff\x0f\x00" + b"\x91" * 4000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x01\x00\x00",
    ],
    ids=["zeros", "ones", "nested", "TLS", "truncated"],
)
def test_garbage(node: NodeProcess, busy: BusySession, sent: bytes) -> None:
    with Address.parse(node.address).connect(5) as sock:
        sock.sendall(sent)
        with suppress(OSError):  # the node may have closed it already
            sock.shutdown(socket.SHUT_WR)
        assert ends(sock, 10)


def message(content: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(content)
    return len(payload).to_bytes(4, "little") + payload


def test_deep_nesting_after_hello(node: NodeProcess, busy: BusySession) -> None:
    """The decoder's recursion is bounded."""
    sock, _ = connect(node.address, 5)
    with sock:
        sock.sendall((500_000).to_bytes(4, "little") + b"\x91" * 500_000)
        assert ends(sock, 10)


@pytest.mark.parametrize(
    "request_",
    [GetStats(), Hello(2, "hash", "again"), CloseSession("0123")],
    ids=["request first", "another hash", "bad id first"],
)
def test_wrong_order(
    node: NodeProcess, busy: BusySession, request_: msgspec.Struct
) -> None:
    with Address.parse(node.address).connect(5) as sock:
        sock.sendall(message(request_))
        assert ends(sock, 10)


def test_too_many_reservations(node: NodeProcess, busy: BusySession) -> None:
    """Small ones are bounded in number, and all go with their connection."""
    one = reservation(make_geometry(num_layers=1), MIB // 32)

    def reserve_many(client: ControlClient) -> None:
        for _ in range(300):
            client.reserve(one)

    with (
        closing(ControlClient(node.address, 10)) as client,
        pytest.raises(
            MemoryNodeError, match="holds 192 reservations; at most 192 of 256"
        ),
    ):
        reserve_many(client)
    with closing(ControlClient(node.address, 10)) as client:
        assert eventually(lambda: client.refresh_info().kv_bytes_free > 128 * MIB)
        assert client.reserve(one).num_blocks


def test_frames_of_all_sessions_are_bounded(
    node: NodeProcess, busy: BusySession
) -> None:
    """Sessions share what a node keeps for frames under way."""
    geometry = make_geometry(num_layers=1)

    def open_many(client: ControlClient) -> None:
        for _ in range(5):
            reserved = client.reserve(reservation(geometry, MIB))
            request: OpenSession = msgspec.structs.replace(
                session_of(reserved.reservation, 1), max_num_tokens=200_000
            )
            client.open_session(request)

    with (
        closing(ControlClient(node.address, 10)) as client,
        pytest.raises(MemoryNodeError, match="are free for this engine. Lower"),
    ):
        open_many(client)


def test_descriptor_limit(start_node: StartNode) -> None:
    """Out of descriptors, a node waits; it neither ends nor spins."""
    node = start_node("127.0.0.1:0")
    process = psutil.Process(node.process.pid)
    with closing(ControlClient(node.address, 5)) as client:
        limit = process.num_fds() + 3
        _, hard = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (limit, hard))
        with ExitStack() as stack:
            address = Address.parse(node.address)
            for _ in range(10):
                stack.enter_context(address.connect(5))
            sentence = "cannot accept connections for now: [Errno 24]"
            assert eventually(lambda: sentence in node.log())
            before = sum(process.cpu_times()[:2])
            time.sleep(1)
            assert sum(process.cpu_times()[:2]) - before < 0.5
            assert client.stats().node.pid == node.process.pid
        assert node.log().count(sentence) < 5
        with closing(ControlClient(node.address, 10)) as other:
            assert other.info.pid == node.process.pid


def test_host_memory_is_short(start_node: StartNode) -> None:
    """A pool that the host cannot give is refused with both reasons."""
    node = start_node("127.0.0.1:0")
    process = psutil.Process(node.process.pid)
    with closing(ControlClient(node.address, 5)) as client:
        reserved = client.reserve(reservation(make_geometry(), 128 * MIB))
        _, hard = process.rlimit(psutil.RLIMIT_AS)
        limit = process.memory_info().vms + 16 * MIB
        process.rlimit(psutil.RLIMIT_AS, (limit, hard))
        request = session_of(reserved.reservation, reserved.num_blocks)
        with pytest.raises(
            MemoryNodeError, match=r"cannot allocate them now \(.*\)\. Stop other"
        ):
            client.open_session(request)
        process.rlimit(psutil.RLIMIT_AS, (hard, hard))
        assert client.open_session(request).session
