# SPDX-License-Identifier: Apache-2.0
"""Whether workers of this host would share memory with a node, or why not."""

from __future__ import annotations

import socket
from contextlib import closing

from vllm_attn_offload.client.handshake import connect
from vllm_attn_offload.client.neighbour import connect_nearest
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.native.library import find_library
from vllm_attn_offload.protocol.messages import NodeInfo
from vllm_attn_offload.transport.address import Address, host_id

_NAME = "shared memory"
_ALLOWED = "a Unix socket of the node that processes of this host reach"


def shared_memory_finding(address: Address, info: NodeInfo, case: Case) -> Finding:
    """Connect as a worker does, and say what its frames would pass.

    Args:
        address: The node, as the user wrote it.
        info: Its description of itself.
        case: What the engine would be.

    Raises:
        MemoryNodeError: The node is gone.
    """
    if not address.path and info.host_id != host_id():
        return Finding.ok(_NAME, "none: the node is on another host, frames pass TCP")
    timeout_s, credentials = case.timeout_s, case.config.credentials
    with closing(connect_nearest(str(address), timeout_s, credentials)) as sock:
        is_near = sock.family == socket.AF_UNIX
    if not is_near:
        return _obstacle(address, info, case)
    if find_library() is None:
        return Finding.warn(
            _NAME,
            "the C library is missing here, so frames pass the socket",
            "the C library on both sides",
            "Install a wheel of vllm-attn-offload.",
        )
    place = f"unix:{info.unix_path}"
    return Finding.ok(_NAME, f"frames of workers here pass it, found by {place}")


def _obstacle(address: Address, info: NodeInfo, case: Case) -> Finding:
    found = f"none: the node is on this host, and workers reach only {address}"
    if not info.unix_path:
        return Finding.warn(
            _NAME,
            f"{found}, by TCP",
            _ALLOWED,
            "Start the node with a second --listen unix:PATH; workers find it.",
        )
    place = f"unix:{info.unix_path}"
    try:
        sock, theirs = connect(place, case.timeout_s, case.config.credentials)
    except (MemoryNodeError, ValueError) as error:
        cause = error.cause if isinstance(error, MemoryNodeError) else str(error)
        return Finding.warn(
            _NAME,
            f"{found}; at {place} {cause}",
            _ALLOWED,
            "Mount the directory of the socket into both containers at the same path, "
            "and run both as one user.",
        )
    sock.close()
    return Finding.warn(
        _NAME,
        f"{found}; at {place} is another node, {theirs.name}",
        _ALLOWED,
        "Give each node of this host a path of its own.",
    )
