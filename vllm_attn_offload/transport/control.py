# SPDX-License-Identifier: Apache-2.0
"""Length-prefixed msgpack messages with deadlines, over a connected socket."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any, TypeVar

import msgspec

from vllm_attn_offload.errors import ProtocolError

_LENGTH = struct.Struct("<I")
_MessageT = TypeVar("_MessageT")
_encoder = msgspec.msgpack.Encoder()


def send_message(
    sock: socket.socket, message: msgspec.Struct, timeout_s: float
) -> None:
    """Send one message within ``timeout_s`` seconds.

    Raises:
        OSError: The peer is gone, or did not take the message in time.
    """
    payload = _encoder.encode(message)
    sock.settimeout(timeout_s)
    sock.sendall(_LENGTH.pack(len(payload)) + payload)


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
        idle_s: Extra seconds to wait for the first byte; None waits for ever.

    Raises:
        ConnectionError: The peer closed the connection.
        TimeoutError: A deadline passed.
        ProtocolError: Too long, not msgpack, or not an allowed message.
    """
    first = bytearray(1)
    sock.settimeout(None if idle_s is None else idle_s + timeout_s)
    if not sock.recv_into(first):
        raise ConnectionResetError("the peer closed the connection")
    deadline = time.monotonic() + timeout_s
    prefix = bytes(first) + _receive_exactly(sock, _LENGTH.size - 1, deadline)
    (num_bytes,) = _LENGTH.unpack(prefix)
    if num_bytes > max_bytes:
        raise ProtocolError(
            f"a control message of {num_bytes:,} bytes; at most {max_bytes:,} are "
            "allowed. Check that the peer is vllm-attn-offload."
        )
    payload = _receive_exactly(sock, num_bytes, deadline)
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not an allowed control message: {error}") from error


def message_decoder(allowed: Any) -> msgspec.msgpack.Decoder[Any]:
    """Decoder for a message class or a union of them."""
    return msgspec.msgpack.Decoder(allowed)


def _receive_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    while view.nbytes:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the peer stopped in the middle of a message")
        sock.settimeout(remaining)
        received = sock.recv_into(view)
        if not received:
            raise ConnectionResetError("the peer closed the connection mid-message")
        view = view[received:]
    return bytes(buffer)
