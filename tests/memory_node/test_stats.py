# SPDX-License-Identifier: Apache-2.0
"""What a node counts: refusals by reason, wrong frames, and a session's own story."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from node_process import NodeProcess, eventually
from raw_session import RawSession, make_geometry, reservation

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.connections import Connection, Connections
from vllm_attn_offload.memory_node.listener import Listener
from vllm_attn_offload.protocol.frames import FrameHeader, FrameKind
from vllm_attn_offload.protocol.messages import Error, Hello, OpenSession, Stats
from vllm_attn_offload.protocol.reasons import INVALID_FRAMES, REFUSED_REASONS
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.control import (
    message_decoder,
    receive_message,
    send_message,
)
from vllm_attn_offload.transport.trust import Credentials

NUM_BLOCKS = 8


class CountingNode:
    """A node with a token, and what it counted since the last look."""

    def __init__(self, process: NodeProcess, token: Path) -> None:
        self.process, self.address = process, process.address
        self.credentials = Credentials(str(token))
        self.client = ControlClient(self.address, 5, self.credentials)
        self._last = self.client.stats()

    def counted(self) -> dict[str, int]:
        """Reasons that counted since the last call, once there is one."""
        assert eventually(lambda: _difference(self._last, self.client.stats()))
        before, self._last = self._last, self.client.stats()
        return _difference(before, self._last)


def _difference(before: Stats, after: Stats) -> dict[str, int]:
    return {
        reason: after_count - before_count
        for old, new in (
            (before.refused, after.refused),
            (before.invalid_frames, after.invalid_frames),
        )
        for (reason, before_count), after_count in zip(
            old.items(), new.values(), strict=True
        )
        if after_count != before_count
    }


@pytest.fixture(scope="module")
def counting_node(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[CountingNode]:
    directory = tmp_path_factory.mktemp("counting")
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text("t" * 32)
    options = ("--kv-cache-gib", "0.05", "--auth-token-file", str(token))
    process = NodeProcess("127.0.0.1:0", directory / "node.log", *options)
    node = CountingNode(process, token)
    yield node
    node.client.close()
    process.kill()


def test_reasons_are_there_before_they_count(counting_node: CountingNode) -> None:
    """A rate begins at 0."""
    stats = counting_node.client.stats()
    assert tuple(stats.refused) == REFUSED_REASONS
    assert tuple(stats.invalid_frames) == INVALID_FRAMES
    assert stats.certificate_expires == 0
    assert stats.frame_bytes_free == stats.frame_bytes_total > 0


def test_refused_peers(counting_node: CountingNode, tmp_path: Path) -> None:
    node = counting_node
    with Address.parse(node.address).connect(5) as sock:
        send_message(sock, Hello(99, "another-hash", "vllm-attn-offload 9.9"), 5)
        decoder = message_decoder(Error)
        assert receive_message(sock, decoder, max_bytes=4096, timeout_s=5).message
    assert node.counted() == {"version": 1}
    other = tmp_path / "token"
    other.touch(mode=0o600)
    other.write_text("u" * 32)
    with pytest.raises(MemoryNodeError, match="the token is not the one"):
        ControlClient(node.address, 5, Credentials(str(other)))
    assert node.counted() == {"token": 1}
    with Address.parse(node.address).connect(5) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert node.counted() == {"request": 1}


def test_a_probe_is_no_refusal(counting_node: CountingNode) -> None:
    """It looks whether the port is open."""
    before = counting_node.client.stats().refused
    for _ in range(3):
        with Address.parse(counting_node.address).connect(5) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
    assert counting_node.client.stats().refused == before


def test_refused_requests(counting_node: CountingNode) -> None:
    node = counting_node
    with pytest.raises(MemoryNodeError, match="are free"):
        node.client.reserve(reservation(make_geometry(), 1 << 40))
    assert node.counted() == {"capacity": 1}
    with pytest.raises(MemoryNodeError, match="no such unopened reservation"):
        node.client.open_session(OpenSession("none", 0, 1, 1, 1, 1))
    assert node.counted() == {"request": 1}


def test_no_room_for_a_connection() -> None:
    """A peer whose connections are all in use gets no more, and that counts."""
    counts: list[int] = []
    connections = Connections(max_total=1, max_per_peer=1)

    def serve(connection: Connection) -> None:
        connection.is_data_channel = True
        connection.sock.recv(1)

    address = Address("127.0.0.1", 0)
    listener = Listener([address], connections, serve, lambda: counts.append(1))
    listener.start()
    try:
        with listener.addresses[0].connect(5):
            assert eventually(lambda: len(connections) == 1)
            with listener.addresses[0].connect(5) as second:
                second.settimeout(5)
                assert second.recv(1) == b""
            assert counts == [1]
        assert listener.is_accepting
    finally:
        listener.stop()
    assert eventually(lambda: not listener.is_accepting)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "header"),
        (FrameHeader(77), "kind"),
        (FrameHeader(FrameKind.STEP, group=9), "step"),
        (FrameHeader(FrameKind.LAYER, layer=0, step=3), "layer"),
    ],
    ids=["header", "kind", "step", "layer"],
)
def test_invalid_frames(
    counting_node: CountingNode, header: FrameHeader | None, reason: str
) -> None:
    node = counting_node
    session = RawSession(node.address, make_geometry(), NUM_BLOCKS, node.credentials)
    with closing(session):
        if header is None:
            session.send_raw(b"\0" * 32)
        else:
            session.send(header)
        assert session.receive()[0] == FrameKind.ERROR
        assert node.counted() == {reason: 1}


def test_a_session(counting_node: CountingNode) -> None:
    """Model, engine and frames of a session that an engine describes."""
    node, geometry = counting_node, make_geometry()
    described = msgspec.structs.replace(
        reservation(geometry, 8 << 20), model="org/Model 7B", engine_index=3
    )
    with closing(ControlClient(node.address, 5, node.credentials)) as control:
        reserved = control.reserve(described)
        control.open_session(OpenSession(reserved.reservation, 5, 8, 64, 8, 8))
        stats = control.stats()
        (session,) = stats.sessions
        assert (session.model, session.engine_index) == ("org/Model 7B", 3)
        assert (session.generation, session.transport) == (5, "")
        assert session.counters.worker_wait_s == 0
        assert stats.frame_bytes_free < stats.frame_bytes_total
        assert stats.num_connections == 2


def test_transport_of_a_session(counting_node: CountingNode) -> None:
    session = RawSession(
        counting_node.address, make_geometry(), NUM_BLOCKS, counting_node.credentials
    )

    def transports() -> list[str]:
        return [each.transport for each in session.control.stats().sessions]

    with closing(session):
        assert eventually(lambda: transports() == ["tcp"])
