# SPDX-License-Identifier: Apache-2.0
"""Chooses what carries a session's frames: memory of a GPU or a host that both sides
share, else the connection.
"""

from __future__ import annotations

import logging
import os
import socket

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.native.channel import load_channels
from vllm_attn_offload.protocol.messages import Attached, ChannelOffer
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.channel_memory import ChannelMemory
from vllm_attn_offload.transport.cuda_memory import (
    DeviceMemory,
    SharedDevice,
)
from vllm_attn_offload.transport.device_memory import (
    DeviceMemoryTransport,
    rows_num_bytes,
)
from vllm_attn_offload.transport.shared_memory import (
    ChannelSetup,
    SharedMemoryTransport,
)
from vllm_attn_offload.transport.socket_transport import SocketTransport
from vllm_attn_offload.transport.spin_policy import (
    process_cpu_ids,
    remote_spin_us,
)

# Not by `get_logger`, which imports vLLM: benchmarks and tests open channels without.
logger = logging.getLogger(f"vllm.{__name__}")

#: A worker logs it where rows of decode steps pass no host.
ROWS_ARE_SHARED = "Rows of decode steps pass through memory of the memory node's GPU"


def offer_channel(
    sock: socket.socket, num_threads: int, device: SharedDevice | None = None
) -> ChannelOffer:
    """Offer what this worker can do.

    Args:
        sock: Connection to the node.
        num_threads: Threads that work while the node waits.
        device: The worker's device, where it can map memory of others there.
    """
    shares = sock.family == socket.AF_UNIX and load_channels() is not None
    return ChannelOffer(
        cpu_ids=sorted(process_cpu_ids()),
        num_threads=num_threads,
        shared_memory=shares,
        device=device.name if shares and device else "",
    )


def open_worker_channel(
    sock: socket.socket,
    attached: Attached,
    *,
    timeout_s: float,
    device: SharedDevice | None = None,
) -> Transport:
    """Open the worker's side of the transport that the node chose.

    Args:
        sock: Connection on which ``attached`` came; owned by the transport.
        attached: The node's answer.
        timeout_s: Longest pause of the node, in seconds.
        device: The one that was offered.

    Raises:
        OSError: The node is gone, or its memory cannot be mapped.
        ProtocolError: The node passed something else than the announced memory.
    """
    channels, spin = load_channels(), _worker_spin_us(sock, attached)
    if attached.shared_memory is None or channels is None:
        return SocketTransport(sock, stall_timeout_s=timeout_s, spin_us=spin)
    memory = ChannelMemory.receive(sock, attached.shared_memory, timeout_s)
    try:
        rows = _map_rows(sock, attached, device)
    except (OSError, ProtocolError):
        memory.close()
        raise
    setup = ChannelSetup(
        sock,
        memory,
        channels,
        rows,
        attached.device_memory,
        is_node=False,
        stall_timeout_s=timeout_s,
        spin_us=spin,
    )
    return open_shared_transport(setup)


def open_shared_transport(setup: ChannelSetup) -> SharedMemoryTransport:
    """Open the transport of either side over memory that both map."""
    if setup.rows is None:
        return SharedMemoryTransport(setup)
    return DeviceMemoryTransport(setup)


def _map_rows(
    sock: socket.socket, attached: Attached, device: SharedDevice | None
) -> DeviceMemory | None:
    """Map the slots that a node offers; None if this worker's GPU cannot reach them.

    Raises:
        OSError: The node is gone or too slow.
        ProtocolError: What came is no descriptor.
    """
    layout, host = attached.device_memory, attached.shared_memory
    if layout is None:
        return None
    data, descriptors, _, _ = socket.recv_fds(sock, 1, 2, socket.MSG_CMSG_CLOEXEC)
    fits = host is not None and layout.num_slots == host.num_slots
    if not data or len(descriptors) != 1 or not fits or device is None:
        for descriptor in descriptors:
            os.close(descriptor)
        if not data:
            raise ConnectionResetError("the peer closed the connection")
        raise ProtocolError("device memory that was not asked for, or does not fit")
    try:
        memory = device.map(descriptors[0], rows_num_bytes(layout))
    except OSError as error:
        logger.warning(
            "Rows pass through the host: this GPU cannot reach the memory node's (%s)",
            error,
        )
        return None
    logger.info(ROWS_ARE_SHARED)
    return memory


def _worker_spin_us(sock: socket.socket, attached: Attached) -> int:
    if is_same_host(sock):
        return attached.spin_us
    return remote_spin_us(process_cpu_ids())


def is_same_host(sock: socket.socket) -> bool:
    """Return True if the peer of a connected socket runs on this host."""
    if sock.family == socket.AF_UNIX:
        return True
    return sock.getpeername()[0] == sock.getsockname()[0]
