# SPDX-License-Identifier: Apache-2.0
"""Control messages that are almost right, sent to a real node."""

from __future__ import annotations

import socket
from contextlib import closing, suppress
from typing import Any

import msgspec
import pytest
from fuzzing import ROUND, broken_bytes, broken_value, fuzz
from hypothesis import given
from hypothesis import strategies as st
from node_process import NodeProcess
from raw_session import (
    attach_request,
    make_hybrid_geometry,
    reservation,
    session_of,
)

from vllm_attn_offload.protocol.messages import (
    MAX_CONTROL_BYTES,
    PROTOCOL_VERSION,
    Attached,
    Authenticate,
    CapacityReserved,
    CloseSession,
    GetStats,
    Hello,
    Ping,
    Reply,
    SessionOpened,
    compatibility_hash,
)
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.control import message_decoder, receive_message

TIMEOUT_S = 20.0
GEOMETRY = make_hybrid_geometry()
decoder = message_decoder(Reply)


def decoded(message: msgspec.Struct) -> dict[str, Any]:
    content: dict[str, Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    return content


HELLO = decoded(Hello(PROTOCOL_VERSION, compatibility_hash(), "fuzz"))
RESERVE = decoded(reservation(GEOMETRY, 1 << 20))
# "reservation" and "attach_token" stand for what the node will have answered.
OPEN = decoded(session_of("reservation", 2))
ATTACH = decoded(attach_request(SessionOpened("reservation", "attach_token"), GEOMETRY))
SEEDS = [
    HELLO,
    RESERVE,
    OPEN,
    ATTACH,
    decoded(CloseSession("reservation")),
    decoded(GetStats()),
    decoded(Ping()),
    decoded(Authenticate(b"n" * 32, b"p" * 32)),
]


@st.composite
def messages(draw: st.DrawFn) -> Any:
    """A message that is intact, has a broken part, or broken bytes."""
    content = draw(st.sampled_from(SEEDS))
    match draw(st.sampled_from(["intact", "intact", "value", "bytes"])):
        case "value":
            return draw(broken_value(content))
        case "bytes":
            return draw(broken_bytes(msgspec.msgpack.encode(content), front=32))
        case _:
            return content


class Conversation:
    """One connection that fills in the names which the node gave.

    Args:
        address: The memory node.
    """

    def __init__(self, address: str) -> None:
        self._names: dict[str, str] = {}
        self._sock = Address.parse(address).connect(TIMEOUT_S)

    def say(self, content: Any) -> bool:
        """Send a message and read the answer; False where none follows."""
        payload = content
        if not isinstance(content, bytes):
            payload = msgspec.msgpack.encode(self._filled_in(content))
        try:
            self._sock.sendall(len(payload).to_bytes(4, "little") + payload)
            reply = receive_message(
                self._sock, decoder, max_bytes=MAX_CONTROL_BYTES, timeout_s=TIMEOUT_S
            )
        except ConnectionError:
            return False
        if isinstance(reply, CapacityReserved):
            self._names["reservation"] = reply.reservation
        if isinstance(reply, SessionOpened):
            self._names["attach_token"] = reply.attach_token
        return not isinstance(reply, Attached)

    def say_last(self, data: bytes) -> None:
        """Send any bytes, and read until the node hangs up."""
        self._sock.settimeout(TIMEOUT_S)
        with suppress(ConnectionError):
            self._sock.sendall(data)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while self._sock.recv(1 << 16):
                continue

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def _filled_in(self, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {
            key: self._names.get(value, value) if isinstance(value, str) else value
            for key, value in content.items()
        }


def test_conversations(unharmed: NodeProcess) -> None:
    @ROUND
    @given(st.sampled_from([[], [RESERVE], [RESERVE, OPEN]]), st.lists(messages()))
    def one_round(opening: list[Any], broken: list[Any]) -> None:
        with closing(Conversation(unharmed.address)) as peer:
            assert all(peer.say(content) for content in [HELLO, *opening])
            all(peer.say(content) for content in broken)

    fuzz(one_round)


@pytest.mark.parametrize("greets", [False, True])
def test_any_bytes(unharmed: NodeProcess, greets: bool) -> None:
    @ROUND
    @given(st.binary(max_size=200))
    def one_round(data: bytes) -> None:
        with closing(Conversation(unharmed.address)) as peer:
            assert not greets or peer.say(HELLO)
            peer.say_last(data)

    one_round()
