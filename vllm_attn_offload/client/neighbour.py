# SPDX-License-Identifier: Apache-2.0
"""Reaches a node of this host over its Unix socket, whatever address it was given."""

from __future__ import annotations

import logging
import os
import socket

from vllm_attn_offload.client.handshake import connect
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.messages import NodeInfo
from vllm_attn_offload.transport.address import host_id
from vllm_attn_offload.transport.trust import Credentials

# Not by `get_logger`, which imports vLLM.
logger = logging.getLogger(f"vllm.{__name__}")

_TIMEOUT_S = 5.0


def connect_nearest(
    address: str, timeout_s: float, credentials: Credentials
) -> socket.socket:
    """Connect to a node as `connect` does, by its Unix socket where that is possible.

    Through a Unix socket both sides share memory. It must be open to this user, on the
    same boot of the same host, and lead to the very process that answered on TCP. The
    node asks for its token there, too; certificates are not used, because the kernel
    names the user at the other end.

    Raises:
        MemoryNodeError: As `connect`.
    """
    sock, info = connect(address, timeout_s, credentials)
    if sock.family == socket.AF_UNIX:
        return sock
    if obstacle := _obstacle(info):
        logger.debug("Memory node %s stays on TCP: %s", address, obstacle)
        return sock
    try:
        nearer, theirs = connect(
            f"unix:{info.unix_path}", min(timeout_s, _TIMEOUT_S), credentials
        )
    except (MemoryNodeError, ValueError) as error:
        logger.debug("Memory node %s stays on TCP: %s", address, error)
        return sock
    if theirs.instance != info.instance:
        logger.debug("Memory node %s stays on TCP: another is at its path", address)
        nearer.close()
        return sock
    sock.close()
    return nearer


def _obstacle(info: NodeInfo) -> str:
    if not info.unix_path:
        return "it has no Unix socket"
    if not host_id() or info.host_id != host_id():
        return "it runs on another host"
    if not os.path.isabs(info.unix_path):
        return "its path is not absolute"
    return ""
