# SPDX-License-Identifier: Apache-2.0
"""Both ends of a data channel in one process, for every kind of transport."""

from __future__ import annotations

import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_attn_offload.memory_node.node_channel import open_node_channel
from vllm_attn_offload.protocol.messages import Attached, ChannelOffer
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.control import message_decoder, receive_message
from vllm_attn_offload.transport.negotiate import open_worker_channel
from vllm_attn_offload.transport.shared_memory import SharedMemoryTransport
from vllm_attn_offload.transport.socket_transport import SocketTransport
from vllm_attn_offload.transport.trust import Credentials

STALL_TIMEOUT_S = 0.6
SLOT_BYTES = 8 << 20

Sockets = tuple[socket.socket, socket.socket]
Channels = tuple[Transport, Transport]


def tcp_pair() -> Sockets:
    """Both ends of a loopback connection."""
    with Address(host="127.0.0.1").listen() as listener:
        port = listener.getsockname()[1]
        ours = Address(host="127.0.0.1", port=port).connect(timeout_s=5)
        return ours, listener.accept()[0]


def tls_pair(directory: Path) -> Sockets:
    """Both ends of a TLS connection; one certificate is authority and both sides."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    if not cert.exists():
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "1"),
                *("-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=node"),
                *("-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", key, "-out", cert),
            ],
            check=True,
            capture_output=True,
        )
    files = Credentials("", str(cert), str(key), str(cert))
    node, compute = files.node_context(), files.compute_context()
    assert node is not None
    assert compute is not None
    ours, theirs = tcp_pair()
    with ThreadPoolExecutor() as executor:
        accepted = executor.submit(node.wrap_socket, theirs, server_side=True)
        connected = compute.wrap_socket(ours, server_hostname="127.0.0.1")
        return connected, accepted.result(5)


def shared_memory_pair(
    *, spins: bool = True, slot_bytes: int = SLOT_BYTES
) -> tuple[SharedMemoryTransport, SharedMemoryTransport]:
    """Worker and node as an attachment connects them."""
    ours, theirs = socket.socketpair()
    # CPUs enough for both sides' threads, or too few, whatever this host has.
    offer = ChannelOffer(list(range(4096 if spins else 1)), 2048, True)
    node = open_node_channel(
        theirs,
        offer,
        request_bytes=slot_bytes,
        reply_bytes=slot_bytes,
        timeout_s=STALL_TIMEOUT_S,
    )
    worker = open_worker_channel(
        ours, receive_attached(ours), timeout_s=STALL_TIMEOUT_S
    )
    assert isinstance(worker, SharedMemoryTransport)
    assert isinstance(node, SharedMemoryTransport)
    return worker, node


def receive_attached(sock: socket.socket) -> Attached:
    """The node's answer to an attachment."""
    decoder = message_decoder(Attached)
    return receive_message(sock, decoder, max_bytes=1 << 10, timeout_s=5)


def channel_pair(kind: str, directory: Path) -> Channels:
    """Worker and node, connected as ``kind`` says."""
    if kind.startswith("shared-memory"):
        return shared_memory_pair(spins=kind.endswith("spin"))
    sockets = {
        "unix": socket.socketpair,
        "tcp": tcp_pair,
        "tcp-spin": tcp_pair,
        "tls": lambda: tls_pair(directory),
    }[kind]()
    spin_us = 100 if kind.endswith("spin") else 0
    ours, theirs = (
        SocketTransport(sock, stall_timeout_s=STALL_TIMEOUT_S, spin_us=spin_us)
        for sock in sockets
    )
    return ours, theirs


def pattern(num_bytes: int, seed: int = 0) -> bytes:
    """Bytes that differ with place and seed."""
    period = bytes((i * 7 + seed) % 251 for i in range(251))
    return (period * (num_bytes // 251 + 1))[:num_bytes]
