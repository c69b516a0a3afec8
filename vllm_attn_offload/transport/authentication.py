# SPDX-License-Identifier: Apache-2.0
"""Proof that both sides of a connection know a token, which never travels.

Either side answers a fresh nonce of the other with an HMAC-SHA-256 (RFC 2104) over its
role, the protocol hash and both nonces: an answer serves one connection and one side.
"""

from __future__ import annotations

import hmac
import secrets
from enum import Enum

from vllm_attn_offload.protocol.messages import NONCE_BYTES, compatibility_hash


class Role(Enum):
    """Who proves; a proof of one side is none of the other."""

    COMPUTE_NODE = b"compute node"
    MEMORY_NODE = b"memory node"


def new_nonce() -> bytes:
    """Random bytes that no connection had before."""
    return secrets.token_bytes(NONCE_BYTES)


def prove(token: bytes, role: Role, node_nonce: bytes, compute_nonce: bytes) -> bytes:
    """What only a holder of ``token`` can compute from the two nonces."""
    parts = (role.value, compatibility_hash().encode(), node_nonce, compute_nonce)
    # Lengths in front: no two lists of parts give the same bytes.
    message = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return hmac.digest(token, message, "sha256")


def is_proof(
    proof: bytes, token: bytes, role: Role, node_nonce: bytes, compute_nonce: bytes
) -> bool:
    """Whether ``proof`` is that of ``role``, compared in constant time."""
    expected = prove(token, role, node_nonce, compute_nonce)
    return hmac.compare_digest(proof, expected)
