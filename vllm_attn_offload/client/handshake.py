# SPDX-License-Identifier: Apache-2.0
"""Open a connection to a memory node: protocol versions, TLS, proof of the token."""

from __future__ import annotations

import socket
import ssl
import time
from typing import TypeVar

import msgspec

from vllm_attn_offload import __version__
from vllm_attn_offload.errors import MemoryNodeError, ProtocolError
from vllm_attn_offload.protocol.messages import (
    MAX_CONTROL_BYTES,
    PROTOCOL_VERSION,
    Authenticate,
    Authenticated,
    Challenge,
    Error,
    Hello,
    NodeInfo,
    Reply,
    compatibility_hash,
)
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.control import (
    HANDSHAKE_TIMEOUT_S,
    hang_up,
    message_decoder,
    receive_message,
    send_message,
)
from vllm_attn_offload.transport.trust import (
    NO_CREDENTIALS,
    Credentials,
    Role,
    is_proof,
    new_nonce,
    prove,
)

_ReplyT = TypeVar("_ReplyT", bound=msgspec.Struct)
_decoder = message_decoder(Reply)


def connect(
    address: str, timeout_s: float, credentials: Credentials = NO_CREDENTIALS
) -> tuple[socket.socket, NodeInfo]:
    """Connect, compare protocol versions, and prove the token to each other.

    On a host so busy that the node waited in vain for this side, it is tried again.

    Args:
        address: The node, as the user wrote it.
        timeout_s: Deadline for the connection and for every answer, each. Nothing is
            tried again after it.
        credentials: What to show the node, and to ask of it; read now. On a Unix socket
            the node's user is compared instead, there is no TLS, and the token is used
            only where the node asks for it.

    Raises:
        MemoryNodeError: Nobody answers, the versions differ, one side does not trust
            the other, or the credentials cannot be read.
    """
    last_moment = time.monotonic() + timeout_s
    while True:
        started = time.monotonic()
        try:
            return _connect_once(address, timeout_s, credentials)
        except MemoryNodeError as error:
            now = time.monotonic()
            was_late = now - started >= HANDSHAKE_TIMEOUT_S and _hung_up(error)
            if not was_late or now >= last_moment:
                raise


def call(
    sock: socket.socket,
    address: str,
    request: msgspec.Struct,
    expected: type[_ReplyT] | tuple[type[_ReplyT], ...],
    timeout_s: float,
) -> _ReplyT:
    """Send a request and wait for its reply.

    A connection that brought no allowed message ends: what comes next on it may be the
    rest of that one.

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
            address,
            f"no answer to {type(request).__name__} within {timeout_s:g} s. Check that "
            "it runs, or raise startup_timeout_s or request_timeout_s.",
        ) from error
    except ssl.SSLError as error:
        raise _tls_failed(address, error) from error
    except (OSError, ProtocolError) as error:
        hang_up(sock)
        raise MemoryNodeError(address, f"the connection broke: {error}.") from error
    if isinstance(reply, Error):
        raise MemoryNodeError(address, reply.message)
    if not isinstance(reply, expected):
        raise MemoryNodeError(
            address,
            f"{type(reply).__name__} came in answer to {type(request).__name__}. Check "
            f"that vllm-attn-offload {__version__} runs there.",
        )
    return reply


def _connect_once(
    address: str, timeout_s: float, credentials: Credentials
) -> tuple[socket.socket, NodeInfo]:
    parsed = Address.parse(address)
    try:
        token = credentials.read_token()
        tls = None if parsed.path else credentials.compute_context()
        sock = parsed.connect(timeout_s)
    except ValueError as error:
        raise MemoryNodeError(address, f"here, {error}") from error
    except OSError as error:
        raise MemoryNodeError(
            address,
            f"cannot connect ({error}). Check that 'vllm-memory-node' is running "
            f"there with vllm-attn-offload {__version__}.",
        ) from error
    try:
        if tls is not None:
            sock = _encrypted(sock, parsed.host, address, timeout_s, tls)
        return sock, _greet(sock, address, timeout_s, token)
    except MemoryNodeError:
        sock.close()
        raise


def _greet(
    sock: socket.socket, address: str, timeout_s: float, token: bytes
) -> NodeInfo:
    hello = Hello(
        PROTOCOL_VERSION, compatibility_hash(), f"vllm-attn-offload {__version__}"
    )
    allowed: tuple[type[NodeInfo | Challenge], ...] = (NodeInfo, Challenge)
    answer = call(sock, address, hello, allowed, timeout_s)
    if isinstance(answer, Challenge):
        return _authenticate(sock, address, timeout_s, token, answer.nonce)
    if token and sock.family != socket.AF_UNIX:
        # Whoever listens there may be anybody.
        raise MemoryNodeError(
            address,
            "it asks for no token, and auth_token_file was given. Start it with "
            "--auth-token-file, or leave the option out here.",
        )
    return answer


def _authenticate(
    sock: socket.socket, address: str, timeout_s: float, token: bytes, theirs: bytes
) -> NodeInfo:
    if not token:
        raise MemoryNodeError(
            address,
            "it asks for a token, and none was given. Set auth_token_file to a copy "
            "of the file of its --auth-token-file.",
        )
    ours = new_nonce()
    request = Authenticate(ours, prove(token, Role.COMPUTE_NODE, theirs, ours))
    answer = call(sock, address, request, Authenticated, timeout_s)
    if not is_proof(answer.proof, token, Role.MEMORY_NODE, theirs, ours):
        raise MemoryNodeError(
            address,
            "it does not know the token of auth_token_file. Check that the address is "
            "the right one and that both sides have the same file.",
        )
    return answer.node


def _encrypted(
    sock: socket.socket,
    host: str,
    address: str,
    timeout_s: float,
    tls: ssl.SSLContext,
) -> socket.socket:
    sock.settimeout(timeout_s)
    try:
        return tls.wrap_socket(sock, server_hostname=host)
    except TimeoutError as error:
        sock.close()
        raise MemoryNodeError(
            address,
            f"no TLS within {timeout_s:g} s. Start it with --tls-cert, --tls-key and "
            "--tls-ca, or leave the tls options out here.",
        ) from error
    except OSError as error:
        sock.close()
        raise _tls_failed(address, error) from error


def _hung_up(error: MemoryNodeError) -> bool:
    """Whether the node closed the connection without a word."""
    return isinstance(error.__cause__, (ConnectionError, ssl.SSLEOFError))


def _tls_failed(address: str, error: OSError) -> MemoryNodeError:
    return MemoryNodeError(
        address,
        f"TLS was not agreed ({error}). Give both sides certificates of the same "
        "tls_ca, that of the node with its name or address, or give neither any.",
    )
