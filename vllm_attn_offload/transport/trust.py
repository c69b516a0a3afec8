# SPDX-License-Identifier: Apache-2.0
"""Trust between both sides of a connection: a shared token, and certificates for TLS.

The token never travels. Either side answers a fresh nonce of the other with an
HMAC-SHA-256 (RFC 2104) over its role, the protocol hash and both nonces: an answer
serves one connection and one side.
"""

from __future__ import annotations

import hmac
import os
import secrets
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from vllm_attn_offload.protocol.messages import compatibility_hash
from vllm_attn_offload.protocol.value_types import NONCE_BYTES
from vllm_attn_offload.transport.certificate import certificate_expiry

MIN_TOKEN_BYTES = 32
_MAX_TOKEN_BYTES = 4096


class Role(Enum):
    """The side that proves; a proof of one side is none of the other."""

    COMPUTE_NODE = b"compute node"
    MEMORY_NODE = b"memory node"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files of one side, read again for every connection.

    A token or certificate that was renewed therefore holds for the next connection.

    Attributes:
        auth_token_file: Token that both sides must know; empty: none is asked for.
        tls_cert: Certificate (PEM) for encrypted TCP connections; empty: they are
            plain, and so are the next two.
        tls_key: Private key (PEM) of ``tls_cert``, without a password.
        tls_ca: Authority (PEM) that signed the certificates of both sides.
        token: The token itself, where a program made it; the file is not read then.
    """

    auth_token_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    token: bytes = field(default=b"", repr=False)

    def with_token(self, token: bytes) -> Credentials:
        """Return the same with a token that a program made; empty: as they are."""
        return replace(self, token=token) if token else self

    def besides_file(self, token: bytes) -> bytes:
        """Return a token that a program made, or none where our file holds it."""
        try:
            is_known = bool(self.auth_token_file) and token == self.read_token()
        except ValueError:  # The file is gone: nobody reads the token there.
            return token
        return b"" if is_known else token

    def read_token(self) -> bytes:
        """Read the token; blanks around it are not part of it.

        Returns:
            ``MIN_TOKEN_BYTES`` or more; none where no file is named.

        Raises:
            ValueError: The file is missing, readable by others, or the token too short.
        """
        if self.token:
            return self.token
        return _read_token(self.auth_token_file) if self.auth_token_file else b""

    def compute_context(self) -> ssl.SSLContext | None:
        """Context of a compute node, which also compares the node's name or address.

        Raises:
            ValueError: A file is missing or cannot be used.
        """
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def node_context(self) -> ssl.SSLContext | None:
        """Context of a memory node, which asks every peer for a certificate.

        Raises:
            ValueError: A file is missing or cannot be used.
        """
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def expiry(self) -> float:
        """Return when our certificate expires, as Unix time; 0 without one, or where
        it cannot be read now."""
        if not self.tls_cert:
            return 0.0
        return certificate_expiry(self.tls_cert, self.tls_key)

    def _context(self, protocol: int) -> ssl.SSLContext | None:
        names = ("tls_cert", "tls_key", "tls_ca")
        files = {name: str(getattr(self, name)) for name in names}
        check_complete(files)
        if not self.tls_cert:
            return None
        for name, path in files.items():
            if not os.path.isfile(path):
                raise ValueError(
                    f"{name} {path!r} is not a file. Allowed: a readable file in PEM "
                    "format. Give all three of tls_cert, tls_key and tls_ca, or none."
                )
        try:
            return _context_of(protocol, **files)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the TLS files {', '.join(map(repr, files.values()))} cannot be used "
                f"({error}). Allowed: a certificate, its private key without a "
                "password, and the certificate of the authority that signed both "
                "sides, all in PEM format. Check that the key belongs to the "
                "certificate."
            ) from error


NO_CREDENTIALS = Credentials()


def check_complete(tls_options: Mapping[str, str]) -> None:
    """Check that all TLS files are named, or none.

    Args:
        tls_options: Files by option, as the user spells it: certificate, key,
            authority.

    Raises:
        ValueError: Only some are named.
    """
    missing = [name for name, path in tls_options.items() if not path]
    if missing and len(missing) < len(tls_options):
        *first, last = tls_options
        raise ValueError(
            f"only some of {', '.join(first)} and {last} were given. Allowed: all "
            f"three, or none. Give the missing ones: {', '.join(missing)}."
        )


def new_nonce() -> bytes:
    """Return ``NONCE_BYTES`` random bytes that no connection had before."""
    return secrets.token_bytes(NONCE_BYTES)


def prove(token: bytes, role: Role, node_nonce: bytes, compute_nonce: bytes) -> bytes:
    """Compute from the two nonces what only a holder of ``token`` can.

    Returns:
        32 bytes.
    """
    parts = (role.value, compatibility_hash().encode(), node_nonce, compute_nonce)
    # Lengths in front: no two lists of parts give the same bytes.
    message = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return hmac.digest(token, message, "sha256")


def is_proof(
    proof: bytes, token: bytes, role: Role, node_nonce: bytes, compute_nonce: bytes
) -> bool:
    """Compare ``proof`` with that of ``role``, in constant time."""
    expected = prove(token, role, node_nonce, compute_nonce)
    return hmac.compare_digest(proof, expected)


def _read_token(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            token = file.read(_MAX_TOKEN_BYTES + 1).strip()
    except OSError as error:
        raise ValueError(
            f"auth_token_file {path!r} cannot be read ({error.strerror}). Allowed: a "
            f"file with a token of at least {MIN_TOKEN_BYTES} bytes. Make one with: "
            f"(umask 077; openssl rand -hex 32 > {path})"
        ) from error
    mode = stat.S_IMODE(status.st_mode)
    # Kubernetes (fsGroup) and systemd (credentials) hand a file of root's to one other
    # user in this way.
    is_handed = status.st_uid == 0 and os.geteuid() != 0
    if mode & (0o037 if is_handed else 0o077):
        raise ValueError(
            f"auth_token_file {path!r} has mode {mode:04o}. Allowed: no access by "
            "group and others, except that the group of a file of root's may read it. "
            f"Run: chmod 600 {path}"
        )
    if not MIN_TOKEN_BYTES <= len(token) <= _MAX_TOKEN_BYTES:
        raise ValueError(
            f"auth_token_file {path!r} holds a token of {len(token):,} bytes. Allowed: "
            f"{MIN_TOKEN_BYTES} to {_MAX_TOKEN_BYTES:,}. Make one with: "
            "openssl rand -hex 32"
        )
    return token


def _context_of(
    protocol: int, tls_cert: str, tls_key: str, tls_ca: str
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        # Connections are never resumed, and a ticket would lie in the socket as if
        # the node had something to say.
        context.num_tickets = 0
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tls_cert, tls_key, password=_no_password)
    context.load_verify_locations(tls_ca)
    return context


def _no_password() -> str:
    # Asked only for an encrypted key; OpenSSL's own prompt would wait for a terminal.
    raise ValueError("the private key is encrypted")
