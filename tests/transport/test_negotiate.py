# SPDX-License-Identifier: Apache-2.0
"""What a worker and its node agree on: shared memory or not, and how long to spin."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from channel_pairs import Sockets, receive_attached, tcp_pair

from vllm_attn_offload.memory_node.node_channel import open_node_channel
from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.frames import FrameHeader
from vllm_attn_offload.protocol.messages import ChannelOffer
from vllm_attn_offload.transport.address import Address, check_peer
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.negotiate import offer_channel, open_worker_channel
from vllm_attn_offload.transport.spin_policy import SPIN_US, process_cpu_ids, spin_us


def open_node(sock: socket.socket, offer: ChannelOffer | None) -> Transport:
    return open_node_channel(
        sock, offer, request_bytes=1 << 16, reply_bytes=1 << 16, timeout_s=5
    )


def attach(sockets: Sockets, offer: ChannelOffer | None) -> tuple[Transport, Transport]:
    node = open_node(sockets[1], offer)
    worker = open_worker_channel(sockets[0], receive_attached(sockets[0]), timeout_s=5)
    return worker, node


def check_exchange(worker: Transport, node: Transport) -> None:
    header = FrameHeader(step=9, num_bytes=5)
    worker.send(header, memoryview(b"hello"))
    received = FrameHeader()
    node.receive_header(received, 5)
    assert received == header
    assert node.receive_payload(5) == b"hello"
    worker.close()
    node.close()


@pytest.mark.skipif(load_waits() is None, reason="the C library is not built")
def test_unix_socket_shares_memory() -> None:
    sockets = socket.socketpair()
    worker, node = attach(sockets, offer_channel(sockets[0], num_threads=1))
    assert worker.name == node.name == "shared memory"
    check_exchange(worker, node)


@pytest.mark.parametrize("offer", [None, ChannelOffer([0], 1, False)])
def test_worker_cannot_share_memory(offer: ChannelOffer | None) -> None:
    worker, node = attach(socket.socketpair(), offer)
    assert worker.name == node.name == "Unix socket"
    check_exchange(worker, node)


def test_tcp_cannot_share_memory() -> None:
    sockets = tcp_pair()
    offer = offer_channel(sockets[0], num_threads=1)
    assert not offer.shared_memory
    worker, node = attach(sockets, offer)
    assert worker.name == node.name == "TCP"
    check_exchange(worker, node)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_other_user_gets_no_memory() -> None:
    """A node checks the peer first, before it negotiates anything."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "node.sock")
        listener = Address(path=path).listen()
        os.chmod(directory, 0o755)
        os.chmod(path, 0o666)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            with Address(path=path).connect(5) as sock:
                sock.recv(1 << 10)
            os._exit(0)
        accepted, _ = listener.accept()
        with accepted, pytest.raises(PermissionError, match="runs as uid 65534"):
            check_peer(accepted)
        listener.close()
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("worker", "node", "expected"),
    [
        (({0}, 1), ({1}, 1), SPIN_US),
        (({0}, 1), ({0}, 1), 0),
        (({0, 1}, 2), ({1}, 1), 0),
        (({0}, 1), ({0, 1}, 2), 0),
        (({0, 1}, 1), ({0, 1}, 1), SPIN_US),
        ((set(range(8)), 8), ({8}, 1), SPIN_US),
    ],
)
def test_spin_us(
    worker: tuple[set[int], int], node: tuple[set[int], int], expected: int
) -> None:
    """Only where a CPU is left for every thread that works and one that spins."""
    assert spin_us(*worker, *node) == spin_us(*node, *worker) == expected


def test_process_cpu_ids_of_a_pinned_team() -> None:
    """Threads that are pinned one by one count together, wherever one asks."""
    every = sorted(os.sched_getaffinity(0))

    def pinned(cpu_id: int) -> set[int]:
        os.sched_setaffinity(0, {cpu_id})
        barrier.wait(5)
        cpu_ids = process_cpu_ids()
        barrier.wait(5)
        return cpu_ids

    barrier = threading.Barrier(len(every))
    with ThreadPoolExecutor(len(every)) as executor:
        assert list(executor.map(pinned, every)) == [set(every)] * len(every)
    assert process_cpu_ids() == set(every)
