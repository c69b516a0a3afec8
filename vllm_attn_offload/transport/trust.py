# SPDX-License-Identifier: Apache-2.0
"""What one side shows another host: a shared token, and a certificate for TLS."""

from __future__ import annotations

import os
import ssl
import stat
from dataclasses import dataclass, field

from vllm_attn_offload.transport.tls import compute_context, node_context

MIN_TOKEN_BYTES = 32
_MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Credentials:
    """Secrets and certificates of one side; none where peers need not be known.

    ``token`` is what both sides must know; empty: none is asked for. ``tls`` encrypts
    TCP connections; None: they are plain.
    """

    token: bytes = field(default=b"", repr=False)
    tls: ssl.SSLContext | None = None

    @classmethod
    def of_compute_node(
        cls, auth_token_file: str, tls_cert: str, tls_key: str, tls_ca: str
    ) -> Credentials:
        """Read the files of an engine or worker; empty names stand for none.

        Raises:
            ValueError: A file is missing, open to others, or cannot be used.
        """
        token = read_token(auth_token_file) if auth_token_file else b""
        if not any((tls_cert, tls_key, tls_ca)):
            return cls(token)
        return cls(token, compute_context(tls_cert, tls_key, tls_ca))

    @classmethod
    def of_memory_node(
        cls, auth_token_file: str, tls_cert: str, tls_key: str, tls_ca: str
    ) -> Credentials:
        """Read the files of a memory node; empty names stand for none.

        Raises:
            ValueError: A file is missing, open to others, or cannot be used.
        """
        token = read_token(auth_token_file) if auth_token_file else b""
        if not any((tls_cert, tls_key, tls_ca)):
            return cls(token)
        return cls(token, node_context(tls_cert, tls_key, tls_ca))


NO_CREDENTIALS = Credentials()


def read_token(path: str) -> bytes:
    """Read a token; blanks around it are not part of it.

    Raises:
        ValueError: The file is missing, readable by others, or the token too short.
    """
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            token = file.read(_MAX_TOKEN_BYTES + 1).strip()
    except OSError as error:
        raise ValueError(
            f"auth_token_file {path!r} cannot be read ({error.strerror}). Allowed: a "
            f"file with a token of at least {MIN_TOKEN_BYTES} bytes. Make one with: "
            f"(umask 077; openssl rand -hex 32 > {path})"
        ) from error
    if mode & 0o077:
        raise ValueError(
            f"auth_token_file {path!r} has mode {mode:04o}. Allowed: no access by "
            f"group and others. Run: chmod 600 {path}"
        )
    if not MIN_TOKEN_BYTES <= len(token) <= _MAX_TOKEN_BYTES:
        raise ValueError(
            f"auth_token_file {path!r} holds a token of {len(token):,} bytes. Allowed: "
            f"{MIN_TOKEN_BYTES} to {_MAX_TOKEN_BYTES:,}. Make one with: "
            "openssl rand -hex 32"
        )
    return token
