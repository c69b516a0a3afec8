# SPDX-License-Identifier: Apache-2.0
"""Why a memory node could not be talked to, as a finding."""

from __future__ import annotations

import ssl

from vllm_attn_offload import __version__
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.errors import MemoryNodeError

_EXPIRED, _NOT_YET_VALID, _OTHER_NAME = 10, 9, 62
#: Words of our own errors, the name of the check that they belong to, what is allowed.
_KINDS = (
    ("protocol version", "version", "the same release on both sides"),
    ("token", "token", "the same token on both sides, or none on both"),
    ("TLS", "TLS", "certificates of one authority on both sides, or on none"),
    (
        "cannot connect",
        "connection",
        "an address where vllm-memory-node listens and that no firewall closes",
    ),
)


def connection_problem(error: MemoryNodeError) -> Finding:
    """Say which check a node failed, and what to do."""
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _certificate_problem(cause)
    for words, check, allowed in _KINDS:
        if words in error.cause:
            return Finding.of_error(check, error.cause, allowed)
    return Finding.of_error(
        "connection",
        error.cause,
        f"an answer of vllm-attn-offload {__version__}",
        "Look at the node's log, and whether only one side was given the tls options.",
    )


def _certificate_problem(error: ssl.SSLCertVerificationError) -> Finding:
    """What this host has against the node's certificate."""
    if error.verify_code == _EXPIRED:
        return Finding.fail(
            "certificate",
            "the node's certificate, or its authority's, has expired",
            "certificates that have not expired",
            "Sign a new one and put it in the place of --tls-cert there; nodes read it "
            "for every connection.",
        )
    if error.verify_code == _NOT_YET_VALID:
        return Finding.fail(
            "certificate",
            "the node's certificate is not valid yet",
            "certificates that are valid now",
            "Compare the clocks of both hosts.",
        )
    if error.verify_code == _OTHER_NAME:
        return Finding.fail(
            "certificate",
            f"the node's certificate is of another name: {error.verify_message}",
            "a certificate with the name or address by which engines know the node",
            "Sign one with it as subjectAltName, or use in memory_nodes the name that "
            "the certificate has.",
        )
    return Finding.fail(
        "certificate",
        f"the node's certificate is not trusted: {error.verify_message}",
        "one that the authority in tls_ca signed",
        "Give both sides certificates of the same authority.",
    )
