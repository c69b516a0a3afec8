# SPDX-License-Identifier: Apache-2.0
"""Which connections are let in, and which one makes room."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from vllm_attn_offload.memory_node.connections import Connection, Connections


class Peers:
    """Connects to a table over socket pairs."""

    def __init__(self, table: Connections, stack: ExitStack) -> None:
        self._table, self._stack = table, stack

    def connect(self, peer: str) -> tuple[Connection | None, socket.socket]:
        ours, theirs = (self._stack.enter_context(s) for s in socket.socketpair())
        theirs.settimeout(5)
        return self._table.admit(ours, peer), theirs


@pytest.fixture
def peers() -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(Connections(max_total=3, max_per_peer=2), stack)


def test_the_idlest_makes_room(peers: Peers) -> None:
    (first, _), (_, second_end) = peers.connect("a"), peers.connect("b")
    assert first is not None
    peers.connect("c")
    first.last_active += 1
    admitted, _ = peers.connect("d")
    assert admitted is not None
    assert second_end.recv(1) == b""


def test_strangers_make_room_first(peers: Peers) -> None:
    """Whoever has not proved the token ends before an idle engine."""
    admitted, admitted_end = peers.connect("a")
    assert admitted is not None
    admitted.is_admitted = True
    _, stranger_end = peers.connect("b")
    peers.connect("c")
    peers.connect("d")
    assert stranger_end.recv(1) == b""
    admitted_end.settimeout(0)
    with pytest.raises(BlockingIOError):
        admitted_end.recv(1)


def test_an_engine_that_sends_heartbeats_stays(peers: Peers) -> None:
    """It may hold nothing yet, and everybody else may be younger."""
    engine, engine_end = peers.connect("a")
    assert engine is not None
    engine.is_admitted = True
    engine.note_request()
    for number in range(4):
        newest, _ = peers.connect(str(number))
        assert newest is not None
        newest.is_admitted = True
    engine_end.settimeout(0)
    with pytest.raises(BlockingIOError):
        engine_end.recv(1)
    engine.last_active -= 3600
    peers.connect("late")
    engine_end.settimeout(5)
    assert engine_end.recv(1) == b""


def test_evictions_are_logged(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    for peer in "abcd":
        peers.connect(peer)
    assert "closed a connection of a to make room: it holds nothing" in caplog.text


def test_a_peer_makes_room_for_itself(peers: Peers) -> None:
    """Its idle connections end before those of others."""
    _, other_end = peers.connect("b")
    _, first_end = peers.connect("a")
    peers.connect("a")
    admitted, _ = peers.connect("a")
    assert admitted is not None
    assert first_end.recv(1) == b""
    other_end.settimeout(0)
    with pytest.raises(BlockingIOError):
        other_end.recv(1)


def test_connections_in_use_stay(peers: Peers) -> None:
    for number in range(3):
        connection, _ = peers.connect(str(number))
        assert connection is not None
        if number:
            connection.is_data_channel = True
        else:
            connection.reservations.append("held")
    assert peers.connect("late")[0] is None
    connection.is_data_channel = False
    assert peers.connect("later")[0] is not None


def test_removed_connections_leave_room() -> None:
    with ExitStack() as stack:
        table = Connections(max_total=1, max_per_peer=1)
        peers = Peers(table, stack)
        for _ in range(5):
            connection, _ = peers.connect("a")
            assert connection is not None
            connection.is_data_channel = True
            table.remove(connection)
