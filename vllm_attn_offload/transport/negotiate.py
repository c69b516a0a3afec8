# SPDX-License-Identifier: Apache-2.0
"""What carries a session's frames: shared memory on one host, else the connection."""

from __future__ import annotations

import logging
import os
import socket
import struct

from vllm_attn_offload.protocol import Attached, ChannelOffer, SlotLayout
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.channel_memory import ChannelMemory
from vllm_attn_offload.transport.control import send_message
from vllm_attn_offload.transport.native import load_waits
from vllm_attn_offload.transport.shared_memory import SharedMemoryTransport
from vllm_attn_offload.transport.spin import process_cpu_ids, remote_spin_us, spin_us
from vllm_attn_offload.transport.tcp import TcpTransport

# Written by the memory node only, whose process has handlers of its own; a compute
# node's loggers must be children of vLLM's.
logger = logging.getLogger(__name__)

#: Unread frames each way: STEP and LAYER of two micro-batches.
NUM_SLOTS = 4
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def offer_channel(sock: socket.socket, num_threads: int) -> ChannelOffer:
    """What this worker can do.

    Args:
        sock: Connection to the node.
        num_threads: Threads that work while the node waits.
    """
    return ChannelOffer(
        cpu_ids=sorted(process_cpu_ids()),
        num_threads=num_threads,
        shared_memory=sock.family == socket.AF_UNIX and load_waits() is not None,
    )


def open_worker_channel(
    sock: socket.socket, attached: Attached, *, timeout_s: float
) -> Transport:
    """The transport that the node chose, worker's side.

    Args:
        sock: Connection on which ``attached`` came; owned by the transport.
        attached: The node's answer.
        timeout_s: Longest pause of the node, in seconds.

    Raises:
        OSError: The node is gone, or its memory cannot be mapped.
        ProtocolError: The node passed something else than the announced memory.
    """
    waits = load_waits()
    spin = attached.spin_us
    if attached.shared_memory is None or waits is None:
        if not _is_same_host(sock):
            spin = remote_spin_us(process_cpu_ids())
        return TcpTransport(sock, stall_timeout_s=timeout_s, spin_us=spin)
    memory = ChannelMemory.receive(sock, attached.shared_memory, timeout_s)
    return SharedMemoryTransport(
        sock, memory, waits, is_node=False, stall_timeout_s=timeout_s, spin_us=spin
    )


def open_node_channel(
    sock: socket.socket,
    offer: ChannelOffer | None,
    *,
    request_bytes: int,
    reply_bytes: int,
    timeout_s: float,
) -> Transport:
    """Choose a transport, answer the worker with Attached, and open the node's side.

    Args:
        sock: Connection of the worker; owned by the transport.
        offer: What the worker brings, or None for frames on the connection.
        request_bytes: Longest payload that the worker may send.
        reply_bytes: Longest payload that the node sends.
        timeout_s: Longest pause of the worker, in seconds.

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
    spin = _node_spin_us(sock, offer)
    try:
        answer = Attached(shared_memory=layout if memory else None, spin_us=spin)
        send_message(sock, answer, timeout_s)
        if memory is not None:
            memory.send_to(sock)
    except OSError:
        if memory is not None:
            memory.close()
        raise
    waits = load_waits()
    if memory is None or waits is None:
        logger.info("a worker attached without shared memory (%s)", obstacle)
        return TcpTransport(sock, stall_timeout_s=timeout_s, spin_us=spin)
    return SharedMemoryTransport(
        sock, memory, waits, is_node=True, stall_timeout_s=timeout_s, spin_us=spin
    )


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
