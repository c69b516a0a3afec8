# SPDX-License-Identifier: Apache-2.0
"""The node's side of the first messages: TLS, protocol versions, proof of the token."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from typing import TypeVar

from vllm_attn_offload.protocol.messages import (
    HANDSHAKE_BYTES,
    Authenticate,
    Authenticated,
    Challenge,
    Error,
    Hello,
    NodeInfo,
    compatibility_hash,
    version_mismatch,
)
from vllm_attn_offload.protocol.reasons import RefusedReason
from vllm_attn_offload.transport.control import (
    message_decoder,
    receive_message,
    send_message,
)
from vllm_attn_offload.transport.trust import (
    Credentials,
    Role,
    is_proof,
    new_nonce,
    prove,
)

_ValueT = TypeVar("_ValueT")
_hello_decoder = message_decoder(Hello)
_authenticate_decoder = message_decoder(Authenticate)


class RefusedError(RuntimeError):
    """A peer may not talk to this node.

    Args:
        sentence: Why, and what to do.
        reason: What of the handshake failed.
    """

    def __init__(self, sentence: str, reason: RefusedReason) -> None:
        super().__init__(sentence)
        self.reason: RefusedReason = reason


class Handshake:
    """Admits one peer within a deadline that no trickle of bytes moves.

    Token and certificates are read when they are needed, so that renewed ones hold for
    the next peer without a restart.

    Args:
        credentials: The node's own.
        timeout_s: For everything from the first byte of TLS to the last message.
    """

    def __init__(self, credentials: Credentials, timeout_s: float) -> None:
        self._credentials = credentials
        self._deadline = time.monotonic() + timeout_s

    def wrap(self, sock: socket.socket) -> socket.socket:
        """Return the socket to talk over: ``sock``, or an encrypted one around it.

        Raises:
            RefusedError: The node's certificate cannot be used any more.
        """
        if sock.family == socket.AF_UNIX:
            return sock
        context = _read(self._credentials.node_context, "tls")
        if context is None:
            return sock
        return context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False
        )

    def shake(self, sock: socket.socket, info: Callable[[], NodeInfo]) -> None:
        """Agree on TLS, versions and the token, then say what the node is.

        Args:
            sock: Result of ``wrap``.
            info: What to tell an admitted peer.

        Raises:
            RefusedError: Another version, the peer does not know the token, or the
                node's own cannot be read any more.
            ProtocolError: The peer speaks something else.
            OSError: The peer is gone, too slow, or shows no good certificate.
        """
        if isinstance(sock, ssl.SSLSocket):
            sock.settimeout(self._remaining_s())
            sock.do_handshake()
        hello = receive_message(
            sock,
            _hello_decoder,
            max_bytes=HANDSHAKE_BYTES,
            timeout_s=self._remaining_s(),
        )
        if hello.compatibility_hash != compatibility_hash():
            sentence = version_mismatch("this memory node", hello)
            self._refuse(sock, sentence, "version")
        if token := _read(self._credentials.read_token, "token"):
            proof = self._challenge(sock, token)
            send_message(sock, Authenticated(proof, info()), self._remaining_s())
        else:
            send_message(sock, info(), self._remaining_s())

    def _challenge(self, sock: socket.socket, token: bytes) -> bytes:
        """Check that the peer knows ``token``; our own proof of it."""
        ours = new_nonce()
        send_message(sock, Challenge(ours), self._remaining_s())
        answer = receive_message(
            sock,
            _authenticate_decoder,
            max_bytes=HANDSHAKE_BYTES,
            timeout_s=self._remaining_s(),
        )
        if not is_proof(answer.proof, token, Role.COMPUTE_NODE, ours, answer.nonce):
            self._refuse(
                sock,
                "the token is not the one of this memory node. Give the same file to "
                "--auth-token-file there and to auth_token_file here.",
                "token",
            )
        return prove(token, Role.MEMORY_NODE, ours, answer.nonce)

    def _refuse(
        self, sock: socket.socket, sentence: str, reason: RefusedReason
    ) -> None:
        send_message(sock, Error(sentence), self._remaining_s())
        raise RefusedError(sentence, reason)

    def _remaining_s(self) -> float:
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the handshake took too long")
        return remaining_s


def _read(read: Callable[[], _ValueT], reason: RefusedReason) -> _ValueT:
    """Call a reader of `Credentials`; a peer is never admitted where it fails."""
    try:
        return read()
    except ValueError as error:
        raise RefusedError(f"here, {error}", reason) from error
