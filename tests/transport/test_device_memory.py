# SPDX-License-Identifier: Apache-2.0
"""Rows in memory of a device: who is offered it, what crosses, when slots come back."""

from __future__ import annotations

import logging
import os
import socket

import pytest
import torch
from channel_pairs import pattern, receive_attached
from host_device import HostDevice

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.memory_node.node_channel import NUM_SLOTS, open_node_channel
from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.frames import FrameHeader
from vllm_attn_offload.protocol.messages import Attached, SlotLayout
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.channel_memory import ChannelMemory
from vllm_attn_offload.transport.control import send_message
from vllm_attn_offload.transport.cuda_memory import DeviceRows
from vllm_attn_offload.transport.device_memory import (
    DeviceMemoryTransport,
    rows_num_bytes,
)
from vllm_attn_offload.transport.negotiate import (
    ROWS_ARE_SHARED,
    offer_channel,
    open_worker_channel,
)

pytestmark = pytest.mark.skipif(load_waits() is None, reason="no C library")

REQUEST_BYTES, REPLY_BYTES = 3000, 2000
Devices = tuple[HostDevice | None, HostDevice | None]


def attach(worker: HostDevice | None, node: HostDevice | None) -> tuple[Transport, ...]:
    """Worker's and node's side."""
    ours, theirs = socket.socketpair()
    rows = None if node is None else DeviceRows(node, REQUEST_BYTES, REPLY_BYTES)
    there = open_node_channel(
        theirs,
        offer_channel(ours, 1, worker),
        request_bytes=1 << 16,
        reply_bytes=1 << 16,
        timeout_s=5,
        device_rows=rows,
    )
    attached = receive_attached(ours)
    return open_worker_channel(ours, attached, timeout_s=5, device=worker), there


def attach_devices() -> tuple[DeviceMemoryTransport, DeviceMemoryTransport]:
    worker, node = attach(HostDevice(), HostDevice())
    assert isinstance(worker, DeviceMemoryTransport)
    assert isinstance(node, DeviceMemoryTransport)
    return worker, node


def as_rows(num_bytes: int, seed: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(pattern(num_bytes, seed)), dtype=torch.uint8)


def send_rows(channel: DeviceMemoryTransport, num_bytes: int, seed: int) -> None:
    channel.rows_buffer(num_bytes).copy_(as_rows(num_bytes, seed))
    channel.send(FrameHeader(step=seed, num_bytes=num_bytes))


def receive_rows(channel: DeviceMemoryTransport, num_bytes: int) -> torch.Tensor:
    header = FrameHeader()
    channel.receive_header(header, 5)
    assert header.num_bytes == num_bytes
    return channel.receive_rows(num_bytes)


def check_host_frame(sender: Transport, receiver: Transport) -> None:
    sender.send(FrameHeader(num_bytes=5), memoryview(b"hello"))
    receiver.receive_header(FrameHeader(), 5)
    assert receiver.receive_payload(5) == b"hello"


def test_rows_cross_among_host_frames() -> None:
    worker, node = attach_devices()
    for seed in range(3 * NUM_SLOTS):
        send_rows(worker, REQUEST_BYTES, seed)
        if seed % 3 == 0:
            worker.send(FrameHeader(num_bytes=5), memoryview(b"hello"))
        assert receive_rows(node, REQUEST_BYTES).equal(as_rows(REQUEST_BYTES, seed))
        if seed % 3 == 0:
            node.receive_header(FrameHeader(), 5)
            assert node.receive_payload(5) == b"hello"
        send_rows(node, REPLY_BYTES - seed, seed)
        found = receive_rows(worker, REPLY_BYTES - seed)
        assert found.equal(as_rows(REPLY_BYTES - seed, seed))
    check_host_frame(node, worker)
    worker.close()
    node.close()


def test_slots_are_apart() -> None:
    """As many frames as there are slots, and none in the rows of another."""
    worker, node = attach_devices()
    for seed in range(NUM_SLOTS):
        send_rows(worker, REQUEST_BYTES, seed)
        send_rows(node, REPLY_BYTES, seed)
    for seed in range(NUM_SLOTS):
        assert receive_rows(node, REQUEST_BYTES).equal(as_rows(REQUEST_BYTES, seed))
        assert receive_rows(worker, REPLY_BYTES).equal(as_rows(REPLY_BYTES, seed))
    worker.close()
    node.close()


def test_rows_are_kept_until_they_are_read() -> None:
    """A copy that runs late reads its own rows, not those of the slot's next frame."""
    worker, node = attach_devices()
    kept: list[torch.Tensor] = []
    for seed in range(3 * NUM_SLOTS):
        send_rows(node, REPLY_BYTES, seed)
        rows = receive_rows(worker, REPLY_BYTES)
        worker.keep_rows(lambda late=rows: kept.append(late.clone()))
        assert len(kept) == seed
    assert all(rows.equal(as_rows(REPLY_BYTES, i)) for i, rows in enumerate(kept))
    worker.close()
    node.close()


def test_rows_that_do_not_fit() -> None:
    worker, node = attach_devices()
    assert worker.fits(REQUEST_BYTES)
    assert not worker.fits(REQUEST_BYTES + 1)
    with pytest.raises(ValueError, match="takes 3,000"):
        worker.rows_buffer(REQUEST_BYTES + 1)
    worker.send(FrameHeader(num_bytes=REQUEST_BYTES + 1))
    node.receive_header(FrameHeader(), 5)
    with pytest.raises(ProtocolError, match="3,001 bytes of rows"):
        node.receive_rows(REQUEST_BYTES + 1)
    worker.close()
    node.close()


def test_close_unmaps_once_and_ends_the_channel() -> None:
    here, there = HostDevice(), HostDevice()
    worker, node = attach(here, there)
    assert isinstance(worker, DeviceMemoryTransport)
    node.close()
    with pytest.raises(ConnectionError):
        worker.receive_header(FrameHeader(), 5)
    worker.close()
    worker.close()
    for device in (here, there):
        (memory,) = device.memory
        assert memory.descriptor == -1
    with pytest.raises(OSError, match="closed"):
        worker.rows_buffer(1)


@pytest.mark.parametrize(
    ("devices", "names", "message"),
    [
        ((None, HostDevice()), ("shared memory",) * 2, "it offers no GPU"),
        ((HostDevice(), None), ("shared memory",) * 2, ""),
        (
            (HostDevice(), HostDevice(problem="no memory is left")),
            ("shared memory",) * 2,
            "through the host: no memory is left",
        ),
        (
            (HostDevice(problem="no peer access"), HostDevice()),
            ("shared memory", "device memory"),
            "GPU cannot reach the memory node's (no peer access)",
        ),
        ((HostDevice(), HostDevice()), ("device memory",) * 2, "on the same GPU"),
        ((HostDevice(), HostDevice()), ("device memory",) * 2, ROWS_ARE_SHARED),
        (
            (HostDevice("device 1"), HostDevice()),
            ("device memory",) * 2,
            "on GPU device 1 are offered",
        ),
    ],
    ids=[
        "cpu-worker",
        "cpu-node",
        "no-memory",
        "no-peer-access",
        "same-gpu",
        "log",
        "two",
    ],
)
def test_who_is_offered_device_memory(
    devices: Devices,
    names: tuple[str, str],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where it cannot be shared, frames pass through the host and the log says so."""
    with caplog.at_level(logging.INFO):
        worker, node = attach(*devices)
    assert (worker.name, node.name) == names
    assert message in caplog.text
    check_host_frame(worker, node)
    check_host_frame(node, worker)
    worker.close()
    node.close()


@pytest.mark.parametrize("given", ["tcp", "no-slots"])
def test_only_shared_channels_have_rows(given: str) -> None:
    """A node says nothing of devices to a worker that shares no memory with it."""
    ours, theirs = socket.socketpair()
    offer = offer_channel(ours, 1, HostDevice())
    assert offer.device == "device 0"
    rows = DeviceRows(HostDevice(), REQUEST_BYTES, REPLY_BYTES)
    node = open_node_channel(
        theirs,
        None if given == "tcp" else offer_channel(ours, 1),
        request_bytes=1 << 16,
        reply_bytes=1 << 16,
        timeout_s=5,
        device_rows=rows,
    )
    assert receive_attached(ours).device_memory is None
    node.close()
    ours.close()


def announce(sock: socket.socket, descriptors: list[int], layout: SlotLayout) -> None:
    """Pass, as a node would, whatever it likes as device memory."""
    host = SlotLayout(NUM_SLOTS, 1 << 16, 1 << 16)
    memory = ChannelMemory.create(host)
    send_message(sock, Attached(host, layout), 5)
    memory.send_to(sock)
    memory.close()
    socket.send_fds(sock, [b"\0"], descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


LAYOUT = SlotLayout(NUM_SLOTS, REQUEST_BYTES, REPLY_BYTES)


@pytest.mark.parametrize(
    ("num_descriptors", "layout", "has_device"),
    [
        (0, LAYOUT, True),
        (2, LAYOUT, True),
        (1, LAYOUT, False),
        (1, SlotLayout(NUM_SLOTS + 1, REQUEST_BYTES, REPLY_BYTES), True),
    ],
    ids=["none", "two", "not-asked-for", "other-slots"],
)
def test_hostile_announcements(
    num_descriptors: int, layout: SlotLayout, has_device: bool
) -> None:
    ours, theirs = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    descriptors = [
        os.dup(HostDevice().allocate(rows_num_bytes(layout)).descriptor)
        for _ in range(num_descriptors)
    ]
    announce(theirs, descriptors, layout)
    device = HostDevice() if has_device else None
    with pytest.raises(ProtocolError, match="device memory"):
        open_worker_channel(ours, receive_attached(ours), timeout_s=5, device=device)
    ours.close()
    theirs.close()
    assert len(os.listdir("/proc/self/fd")) <= before + num_descriptors


@pytest.mark.parametrize("num_bytes", [0, 1, rows_num_bytes(LAYOUT) - 1, 1 << 22])
def test_descriptor_of_another_size(num_bytes: int) -> None:
    """The device refuses it, and rows pass through the host."""
    ours, theirs = socket.socketpair()
    descriptor = os.memfd_create("hostile")
    os.ftruncate(descriptor, num_bytes)
    announce(theirs, [descriptor], LAYOUT)
    worker = open_worker_channel(
        ours, receive_attached(ours), timeout_s=5, device=HostDevice()
    )
    assert worker.name == "shared memory"
    worker.close()
    theirs.close()
