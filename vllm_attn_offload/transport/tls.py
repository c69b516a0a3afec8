# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS between compute and memory nodes: both show a certificate of one CA."""

from __future__ import annotations

import ssl
from pathlib import Path

_OPTIONS = ("tls_cert", "tls_key", "tls_ca")


def node_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """Context of a memory node, which asks every peer for a certificate.

    Raises:
        ValueError: A file is missing or cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Connections are never resumed, and a ticket would lie in the socket as if the
    # node had something to say.
    context.num_tickets = 0
    return _loaded(context, cert, key, ca)


def compute_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """Context of a compute node, which also compares the node's name or address.

    Raises:
        ValueError: A file is missing or cannot be used.
    """
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), cert, key, ca)


def _loaded(context: ssl.SSLContext, cert: str, key: str, ca: str) -> ssl.SSLContext:
    for name, path in zip(_OPTIONS, (cert, key, ca), strict=True):
        if not Path(path).is_file():
            raise ValueError(
                f"{name} {path!r} is not a file. Allowed: a readable file in PEM "
                "format. Give all three of tls_cert, tls_key and tls_ca, or none."
            )
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(cert, key, password=_no_password)
        context.load_verify_locations(ca)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the TLS files {cert!r}, {key!r} and {ca!r} cannot be used ({error}). "
            "Allowed: a certificate, its private key without a password, and the "
            "certificate of the authority that signed both sides, all in PEM format. "
            "Check that the key belongs to the certificate."
        ) from error
    return context


def _no_password() -> str:
    # Asked only for an encrypted key; OpenSSL's own prompt would wait for a terminal.
    raise ValueError("the private key is encrypted")
