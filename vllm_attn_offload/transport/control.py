# SPDX-License-Identifier: Apache-2.0
"""Length-prefixed msgpack messages with deadlines, over a connected socket."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import Any, TypeVar

import msgspec

from vllm_attn_offload.errors import ProtocolError

#: A memory node closes a connection whose handshake takes longer, in seconds.
HANDSHAKE_TIMEOUT_S = 5.0

_LENGTH = struct.Struct("<I")
# A peer that claims a long message gets memory for what it has sent, not for more.
_CHUNK_BYTES = 1 << 16
_MessageT = TypeVar("_MessageT")
_encoder = msgspec.msgpack.Encoder()


def send_message(
    sock: socket.socket, message: msgspec.Struct, timeout_s: float
) -> None:
    """Send one message within ``timeout_s`` seconds.

    Raises:
        OSError: The peer is gone, or did not take the message in time.
    """
    deadline = time.monotonic() + timeout_s
    payload = _encoder.encode(message)
    view = memoryview(_LENGTH.pack(len(payload)) + payload)
    while view.nbytes:
        sock.settimeout(_remaining_s(deadline, "the peer takes no data"))
        view = view[sock.send(view) :]


def receive_message(
    sock: socket.socket,
    decoder: msgspec.msgpack.Decoder[_MessageT],
    *,
    max_bytes: int,
    timeout_s: float,
    idle_s: float | None = 0.0,
) -> _MessageT:
    """Receive one message.

    Args:
        sock: A connected socket.
        decoder: Decoder for the messages that are allowed here.
        max_bytes: Longest payload that is accepted.
        timeout_s: Deadline for the whole message once its first byte is here.
        idle_s: Extra seconds to wait for the first byte; None waits for ever. With 0
            the whole message is here within ``timeout_s``.

    Raises:
        ConnectionError: The peer closed the connection.
        TimeoutError: A deadline passed.
        ProtocolError: Too long, not msgpack, or not an allowed message.
    """
    first_s = None if idle_s is None else idle_s + timeout_s
    last_moment = None if first_s is None else time.monotonic() + first_s
    sock.settimeout(first_s)
    prefix = sock.recv(1)
    if not prefix:
        raise ConnectionResetError("the peer closed the connection")
    deadline = time.monotonic() + timeout_s
    if last_moment is not None:
        deadline = min(deadline, last_moment)
    prefix += _receive_exactly(sock, _LENGTH.size - 1, deadline)
    payload = _receive_exactly(sock, _checked_length(prefix, max_bytes), deadline)
    try:
        return decoder.decode(payload)
    # Text that is not UTF-8 and deep nesting have errors of their own.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not an allowed control message: {error}") from error


def message_decoder(allowed: Any) -> msgspec.msgpack.Decoder[Any]:
    """Return a decoder for a message class or a union of them."""
    return msgspec.msgpack.Decoder(allowed)


def hang_up(sock: socket.socket) -> None:
    """End a connection both ways; wakes a thread that waits in it."""
    with contextlib.suppress(OSError):
        # Not SSLSocket.shutdown, which takes the TLS state away from that thread.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _checked_length(prefix: bytes, max_bytes: int) -> int:
    (num_bytes,) = _LENGTH.unpack(prefix)
    if num_bytes > max_bytes:
        raise ProtocolError(
            f"a control message of {num_bytes:,} bytes; at most {max_bytes:,} are "
            "allowed. Check that the peer is vllm-attn-offload and that both sides "
            "use TLS, or neither."
        )
    return int(num_bytes)


def _receive_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        sock.settimeout(
            _remaining_s(deadline, "the peer stopped in the middle of a message")
        )
        chunk = sock.recv(min(num_bytes - len(received), _CHUNK_BYTES))
        if not chunk:
            raise ConnectionResetError("the peer closed the connection mid-message")
        received += chunk
    return bytes(received)


def _remaining_s(deadline: float, problem: str) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError(problem)
    return remaining_s
