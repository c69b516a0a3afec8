# SPDX-License-Identifier: Apache-2.0
"""What carries a session's frames: memory of a GPU or a host that both sides share,
else the connection.
"""

from __future__ import annotations

import logging
import os
import socket
import struct

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.native.waits import NativeWaits, load_waits
from vllm_attn_offload.protocol.messages import Attached, ChannelOffer, SlotLayout
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.channel_memory import ChannelMemory
from vllm_attn_offload.transport.control import send_message
from vllm_attn_offload.transport.device_memory import (
    DeviceMemoryTransport,
    rows_num_bytes,
)
from vllm_attn_offload.transport.shared_device import (
    DeviceMemory,
    DeviceRows,
    SharedDevice,
)
from vllm_attn_offload.transport.shared_memory import SharedMemoryTransport
from vllm_attn_offload.transport.socket_transport import SocketTransport
from vllm_attn_offload.transport.spin_policy import (
    process_cpu_ids,
    remote_spin_us,
    spin_us,
)

# The memory node's process has handlers of its own; a compute node's loggers must be
# children of vLLM's.
logger = logging.getLogger(__name__)
_worker_logger = logging.getLogger(f"vllm.{__name__}")

#: What a worker logs where rows of decode steps pass no host.
ROWS_ARE_SHARED = "Rows of decode steps pass through memory of the memory node's GPU"
#: Unread frames each way: STEP and LAYER of two micro-batches.
NUM_SLOTS = 4
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def offer_channel(
    sock: socket.socket, num_threads: int, device: SharedDevice | None = None
) -> ChannelOffer:
    """What this worker can do.

    Args:
        sock: Connection to the node.
        num_threads: Threads that work while the node waits.
        device: What the worker computes on, where it can map memory of others there.
    """
    shares = sock.family == socket.AF_UNIX and load_waits() is not None
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
    """The transport that the node chose, worker's side.

    Args:
        sock: Connection on which ``attached`` came; owned by the transport.
        attached: The node's answer.
        timeout_s: Longest pause of the node, in seconds.
        device: As offered.

    Raises:
        OSError: The node is gone, or its memory cannot be mapped.
        ProtocolError: The node passed something else than the announced memory.
    """
    waits = load_waits()
    spin = attached.spin_us
    if attached.shared_memory is None or waits is None:
        if not _is_same_host(sock):
            spin = remote_spin_us(process_cpu_ids())
        return SocketTransport(sock, stall_timeout_s=timeout_s, spin_us=spin)
    memory = ChannelMemory.receive(sock, attached.shared_memory, timeout_s)
    rows: DeviceMemory | None = None
    try:
        rows = _map_rows(sock, attached, device)
    except (OSError, ProtocolError):
        memory.close()
        raise
    return _shared_transport(
        sock,
        memory,
        rows,
        attached.device_memory,
        waits,
        is_node=False,
        timeout_s=timeout_s,
        spin=spin,
    )


def open_node_channel(
    sock: socket.socket,
    offer: ChannelOffer | None,
    *,
    request_bytes: int,
    reply_bytes: int,
    timeout_s: float,
    device_rows: DeviceRows | None = None,
) -> Transport:
    """Choose a transport, answer the worker with Attached, and open the node's side.

    Args:
        sock: Connection of the worker; owned by the transport.
        offer: What the worker brings, or None for frames on the connection.
        request_bytes: Longest payload that the worker may send.
        reply_bytes: Longest payload that the node sends.
        timeout_s: Longest pause of the worker, in seconds.
        device_rows: What the node can share of its GPU.

    Raises:
        OSError: The worker is gone.
    """
    obstacle, memory = _obstacle(sock, offer), None
    layout = SlotLayout(NUM_SLOTS, request_bytes, reply_bytes)
    if not obstacle:
        try:
            memory = ChannelMemory.create(layout)
        except (OSError, ValueError) as error:
            obstacle = f"it cannot be made: {error}"
    rows, rows_layout = _allocate_rows(offer, device_rows if memory else None)
    spin = _node_spin_us(sock, offer)
    try:
        answer = Attached(
            shared_memory=layout if memory else None,
            device_memory=rows_layout,
            spin_us=spin,
        )
        send_message(sock, answer, timeout_s)
        if memory is not None:
            memory.send_to(sock)
        if rows is not None:
            socket.send_fds(sock, [b"\0"], [rows.descriptor])
    except OSError:
        for each in (memory, rows):
            if each is not None:
                each.close()
        raise
    waits = load_waits()
    if memory is None or waits is None:
        logger.info("a worker attached without shared memory (%s)", obstacle)
        return SocketTransport(sock, stall_timeout_s=timeout_s, spin_us=spin)
    return _shared_transport(
        sock,
        memory,
        rows,
        rows_layout,
        waits,
        is_node=True,
        timeout_s=timeout_s,
        spin=spin,
    )


def _shared_transport(
    sock: socket.socket,
    memory: ChannelMemory,
    rows: DeviceMemory | None,
    rows_layout: SlotLayout | None,
    waits: NativeWaits,
    *,
    is_node: bool,
    timeout_s: float,
    spin: int,
) -> SharedMemoryTransport:
    if rows is None or rows_layout is None:
        return SharedMemoryTransport(
            sock,
            memory,
            waits,
            is_node=is_node,
            stall_timeout_s=timeout_s,
            spin_us=spin,
        )
    return DeviceMemoryTransport(
        sock,
        memory,
        waits,
        rows,
        rows_layout,
        is_node=is_node,
        stall_timeout_s=timeout_s,
        spin_us=spin,
    )


def _allocate_rows(
    offer: ChannelOffer | None, device_rows: DeviceRows | None
) -> tuple[DeviceMemory | None, SlotLayout | None]:
    """Slots of this node's GPU for a worker that computes on a GPU of this host."""
    if device_rows is None or offer is None:
        return None, None
    if not offer.device:
        logger.info("rows of a worker pass through the host: it offers no GPU")
        return None, None
    layout = SlotLayout(NUM_SLOTS, device_rows.request_bytes, device_rows.reply_bytes)
    try:
        memory = device_rows.device.allocate(rows_num_bytes(layout))
    except OSError as error:
        logger.warning("rows of a worker pass through the host: %s", error)
        return None, None
    is_same = offer.device == device_rows.device.name
    where = "the same GPU" if is_same else f"GPU {offer.device}"
    logger.info("rows of a worker on %s are offered memory of this GPU", where)
    return memory, layout


def _map_rows(
    sock: socket.socket, attached: Attached, device: SharedDevice | None
) -> DeviceMemory | None:
    """The slots that a node offers; None where this worker's GPU does not reach them.

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
        _worker_logger.warning(
            "Rows pass through the host: this GPU cannot reach the memory node's (%s)",
            error,
        )
        return None
    _worker_logger.info(ROWS_ARE_SHARED)
    return memory


def _obstacle(sock: socket.socket, offer: ChannelOffer | None) -> str:
    """Why memory cannot be shared with this worker; "" if it can."""
    if sock.family != socket.AF_UNIX:
        return "its connection is TCP"
    if offer is None or not offer.shared_memory:
        return "it has no C library"
    if load_waits() is None:
        return "this node was installed without a compiler"
    credentials = sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
    )
    _, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
    if uid not in (0, os.geteuid()):
        return f"it belongs to another user, uid {uid}"
    return ""


def _node_spin_us(sock: socket.socket, offer: ChannelOffer | None) -> int:
    cpu_ids = os.sched_getaffinity(0)
    if offer is None or not _is_same_host(sock):
        return remote_spin_us(cpu_ids)
    # The kernel works on every CPU of the node.
    return spin_us(cpu_ids, len(cpu_ids), set(offer.cpu_ids), offer.num_threads)


def _is_same_host(sock: socket.socket) -> bool:
    if sock.family == socket.AF_UNIX:
        return True
    return sock.getpeername()[0] == sock.getsockname()[0]
