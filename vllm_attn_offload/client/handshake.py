# SPDX-License-Identifier: Apache-2.0
"""Open a connection to a memory node and agree on the protocol."""

from __future__ import annotations

import socket
from typing import TypeVar

import msgspec

from vllm_attn_offload import __version__
from vllm_attn_offload.errors import MemoryNodeError, ProtocolError
from vllm_attn_offload.protocol import (
    MAX_CONTROL_BYTES,
    PROTOCOL_VERSION,
    Error,
    Hello,
    NodeInfo,
    Reply,
    compatibility_hash,
)
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.control import (
    message_decoder,
    receive_message,
    send_message,
)

_ReplyT = TypeVar("_ReplyT", bound=msgspec.Struct)
_decoder = message_decoder(Reply)


def connect(address: str, timeout_s: float) -> tuple[socket.socket, NodeInfo]:
    """Connect and compare protocol versions.

    Args:
        address: The node, as the user wrote it.
        timeout_s: Deadline for the connection and for the answer, each.

    Raises:
        MemoryNodeError: Nobody answers, or the versions differ.
    """
    try:
        sock = Address.parse(address).connect(timeout_s)
    except OSError as error:
        raise MemoryNodeError(
            address,
            f"cannot connect ({error}). Check that 'vllm-memory-node' is running "
            f"there with vllm-attn-offload {__version__}.",
        ) from error
    hello = Hello(
        PROTOCOL_VERSION, compatibility_hash(), f"vllm-attn-offload {__version__}"
    )
    try:
        return sock, call(sock, address, hello, NodeInfo, timeout_s)
    except MemoryNodeError:
        sock.close()
        raise


def call(
    sock: socket.socket,
    address: str,
    request: msgspec.Struct,
    expected: type[_ReplyT],
    timeout_s: float,
) -> _ReplyT:
    """Send a request and wait for its reply.

    Raises:
        MemoryNodeError: The node refused, is gone, or did not answer in time.
    """
    try:
        send_message(sock, request, timeout_s)
        reply = receive_message(
            sock, _decoder, max_bytes=MAX_CONTROL_BYTES, timeout_s=timeout_s
        )
    except TimeoutError as error:
        raise MemoryNodeError(
            address, f"no answer to {type(request).__name__} within {timeout_s:g} s."
        ) from error
    except (OSError, ProtocolError) as error:
        raise MemoryNodeError(address, f"the connection broke: {error}.") from error
    if isinstance(reply, Error):
        raise MemoryNodeError(address, reply.message)
    if not isinstance(reply, expected):
        raise MemoryNodeError(
            address,
            f"{type(reply).__name__} came in answer to {type(request).__name__}.",
        )
    return reply
