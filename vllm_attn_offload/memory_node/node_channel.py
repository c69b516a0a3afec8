# SPDX-License-Identifier: Apache-2.0
"""The node's side of a data channel: chooses what carries a session's frames."""

from __future__ import annotations

import logging
import os
import socket

from vllm_attn_offload.native.channel import load_channels
from vllm_attn_offload.protocol.messages import Attached, ChannelOffer, SlotLayout
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.channel_memory import ChannelMemory
from vllm_attn_offload.transport.control import send_message
from vllm_attn_offload.transport.cuda_memory import DeviceMemory, DeviceRows
from vllm_attn_offload.transport.device_memory import rows_num_bytes
from vllm_attn_offload.transport.negotiate import is_same_host, open_shared_transport
from vllm_attn_offload.transport.shared_memory import ChannelSetup
from vllm_attn_offload.transport.socket_transport import SocketTransport
from vllm_attn_offload.transport.spin_policy import remote_spin_us, spin_us

logger = logging.getLogger(__name__)

#: Unread frames each way: STEP and LAYER of two micro-batches.
NUM_SLOTS = 4


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
    channels, spin = load_channels(), _node_spin_us(sock, offer)
    layout = SlotLayout(NUM_SLOTS, request_bytes, reply_bytes)
    memory = _create_memory(sock, offer, layout)
    if memory is None or channels is None:
        send_message(sock, Attached(spin_us=spin), timeout_s)
        return SocketTransport(sock, stall_timeout_s=timeout_s, spin_us=spin)
    setup = ChannelSetup(
        sock,
        memory,
        channels,
        *_allocate_rows(offer, device_rows),
        is_node=True,
        stall_timeout_s=timeout_s,
        spin_us=spin,
    )
    _send_setup(setup, layout)
    return open_shared_transport(setup)


def _send_setup(setup: ChannelSetup, layout: SlotLayout) -> None:
    """Tell the worker what was chosen, and pass the memory.

    Raises:
        OSError: The worker is gone; the memory is closed.
    """
    try:
        answer = Attached(
            shared_memory=layout,
            device_memory=setup.rows_layout,
            spin_us=setup.spin_us,
        )
        send_message(setup.sock, answer, setup.stall_timeout_s)
        setup.memory.send_to(setup.sock)
        if setup.rows is not None:
            socket.send_fds(setup.sock, [b"\0"], [setup.rows.descriptor])
    except OSError:
        setup.memory.close()
        if setup.rows is not None:
            setup.rows.close()
        raise


def _create_memory(
    sock: socket.socket, offer: ChannelOffer | None, layout: SlotLayout
) -> ChannelMemory | None:
    """Make memory to share with a worker; None, and why in the log, if that fails."""
    obstacle = _obstacle(sock, offer)
    if not obstacle:
        try:
            return ChannelMemory.create(layout)
        except (OSError, ValueError) as error:
            obstacle = f"it cannot be made: {error}"
    logger.info("a worker attached without shared memory (%s)", obstacle)
    return None


def _allocate_rows(
    offer: ChannelOffer | None, device_rows: DeviceRows | None
) -> tuple[DeviceMemory | None, SlotLayout | None]:
    """Allocate slots of this node's GPU for a worker on a GPU of this host."""
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
    memory.clear()  # the worker sees all of it
    is_same = offer.device == device_rows.device.name
    where = "the same GPU" if is_same else f"GPU {offer.device}"
    logger.info("rows of a worker on %s are offered memory of this GPU", where)
    return memory, layout


def _obstacle(sock: socket.socket, offer: ChannelOffer | None) -> str:
    """Say why memory cannot be shared with this worker; "" if it can."""
    if sock.family != socket.AF_UNIX:
        return "its connection is TCP"
    if offer is None or not offer.shared_memory:
        return "it has no C library"
    if load_channels() is None:
        return "this node was installed without a compiler"
    return ""


def _node_spin_us(sock: socket.socket, offer: ChannelOffer | None) -> int:
    cpu_ids = os.sched_getaffinity(0)
    if offer is None or not is_same_host(sock):
        return remote_spin_us(cpu_ids)
    # The kernel works on every CPU of the node.
    return spin_us(cpu_ids, len(cpu_ids), set(offer.cpu_ids), offer.num_threads)
