# SPDX-License-Identifier: Apache-2.0
"""Shared memory between real processes: killed and hostile peers, and what is left."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import channel_pairs
import psutil
import pytest
from channel_pairs import receive_attached, shared_memory_pair
from peer_process import SLOT_BYTES, open_channel

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.native.waits import NativeWaits, load_waits
from vllm_attn_offload.protocol.frames import FrameHeader, FrameKind
from vllm_attn_offload.protocol.messages import SlotLayout
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.channel_memory import NUM_SIGNALS, ChannelMemory

PEER = Path(channel_pairs.__file__).with_name("peer_process.py")
LAYOUT = SlotLayout(4, SLOT_BYTES, SLOT_BYTES)

Attack = Callable[[ChannelMemory, NativeWaits, socket.socket], None]


@pytest.fixture(scope="module", autouse=True)
def waits() -> NativeWaits:
    library = load_waits()
    if library is None:
        pytest.skip("the C library is not built")
    return library


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Neither descriptors nor mappings, however a test's peer ended."""
    before = left()
    yield
    assert left() == before


def left() -> tuple[int, int]:
    maps = Path("/proc/self/maps").read_text()
    return psutil.Process().num_fds(), maps.count("memfd:vllm-attn-offload")


@contextmanager
def peer(what: str) -> Iterator[tuple[Transport, subprocess.Popen[str]]]:
    """A channel whose other side is a process; ``what`` is as in `peer_process`."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, PEER, str(theirs.fileno()), what],
        pass_fds=(theirs.fileno(),),
        stdout=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    channel = open_channel(ours, is_node=what.startswith("worker"))
    assert channel.name == "shared memory"
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "/memfd:vllm-attn-offload (deleted)" in maps
        assert "/dev/shm" not in maps
        yield channel, process
    finally:
        channel.close()
        process.kill()
        process.communicate()


def wait_for_frame(channel: Transport) -> None:
    while True:
        channel.receive_header(FrameHeader(), 30)


def send_for_ever(channel: Transport) -> None:
    while True:
        header = FrameHeader(FrameKind.LAYER, num_bytes=SLOT_BYTES)
        channel.send(header, channel.payload_buffer(SLOT_BYTES))


def exchange(channel: Transport) -> None:
    while True:
        channel.send(FrameHeader(num_bytes=8), memoryview(b"12345678"))
        channel.receive_header(FrameHeader(), 30)


@pytest.mark.parametrize(
    ("what", "wait"),
    [
        ("worker-silent", wait_for_frame),
        ("worker-silent", send_for_ever),
        ("worker-flood", wait_for_frame),
        ("node-echo", wait_for_frame),
        ("node-echo", exchange),
        ("node-stuck", send_for_ever),
    ],
)
def test_peer_is_killed(what: str, wait: Callable[[Transport], None]) -> None:
    """At any point: in a wait, a reply, a request, or with every slot in use."""
    with peer(what) as (channel, process):
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
        started = time.monotonic()
        with pytest.raises(ConnectionError):
            wait(channel)
        assert time.monotonic() - started < 10
        killer.wait()


def test_waits_use_no_cpu_time() -> None:
    with peer("node-echo") as (channel, process):
        for _ in range(100):
            channel.send(FrameHeader(num_bytes=8), memoryview(b"12345678"))
            channel.receive_header(FrameHeader(), 5)
        node = psutil.Process(process.pid)
        time.sleep(0.1)
        before, ours = node.cpu_times(), time.process_time()
        with pytest.raises(TimeoutError):
            channel.receive_header(FrameHeader(), 2)
        after = node.cpu_times()
        assert time.process_time() - ours < 0.2
        assert after.user + after.system - before.user - before.system < 0.2


def test_slot_that_was_freed_last_is_used_first() -> None:
    """In turns, one slot each way touches memory."""
    worker, node = shared_memory_pair(slot_bytes=1 << 16)
    header = FrameHeader()
    buffers = set()
    for step in range(20):
        buffer = worker.payload_buffer(100 + step % 2)
        buffers.add(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
        worker.send(FrameHeader(num_bytes=buffer.nbytes), buffer)
        node.receive_header(header, 5)
        with pytest.raises(TimeoutError):
            node.receive_header(header, 0)
    assert len(buffers) == 1
    del buffer
    worker.close()
    node.close()


def test_send_too_long() -> None:
    worker, node = shared_memory_pair(slot_bytes=1 << 16)
    payload = memoryview(bytes((1 << 16) + 1))
    with pytest.raises(ValueError, match="65,537 bytes was to be sent"):
        worker.send(FrameHeader(num_bytes=payload.nbytes), payload)
    with pytest.raises(ValueError, match="this channel allows 65,536"):
        node.payload_buffer(payload.nbytes)
    worker.close()
    node.close()


def test_view_outlives_the_channel() -> None:
    """Memory stays mapped while a payload is looked at, as the kernel does."""
    worker, node = shared_memory_pair(slot_bytes=1 << 16)
    worker.send(FrameHeader(num_bytes=4), memoryview(b"last"))
    node.receive_header(FrameHeader(), 5)
    view = node.receive_payload(4)
    node.close()
    worker.close()
    assert view == b"last"


def announce(memory: ChannelMemory, waits: NativeWaits, sock: socket.socket) -> None:
    waits.post(ctypes.byref(memory.signal(0, sock, 0)))


def no_header(memory: ChannelMemory, waits: NativeWaits, sock: socket.socket) -> None:
    announce(memory, waits, sock)


def long_frame(memory: ChannelMemory, waits: NativeWaits, sock: socket.socket) -> None:
    header = FrameHeader(FrameKind.LAYER, num_bytes=SLOT_BYTES + 1)
    header.pack_into(memory.requests.headers[0])
    announce(memory, waits, sock)


def no_slot(memory: ChannelMemory, waits: NativeWaits, sock: socket.socket) -> None:
    FrameHeader(FrameKind.LAYER).pack_into(memory.requests.headers[0])
    memory.requests.slot_indices[0][0] = 4
    announce(memory, waits, sock)


def many_frames(memory: ChannelMemory, waits: NativeWaits, sock: socket.socket) -> None:
    signal = memory.signal(0, sock, 0)
    signal.posted = (1 << 64) - 2
    waits.post(ctypes.byref(signal))


def bytes_on_the_socket(
    memory: ChannelMemory, waits: NativeWaits, sock: socket.socket
) -> None:
    sock.sendall(b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        (no_header, ProtocolError),
        (long_frame, ProtocolError),
        (no_slot, ProtocolError),
        (many_frames, ProtocolError),
        (bytes_on_the_socket, ConnectionError),
    ],
)
def test_hostile_worker(
    attack: Attack, error: type[Exception], waits: NativeWaits
) -> None:
    ours, theirs = socket.socketpair()
    node = open_channel(ours, is_node=True)
    attached = receive_attached(theirs)
    assert attached.shared_memory == LAYOUT
    memory = ChannelMemory.receive(theirs, attached.shared_memory, 5)
    attack(memory, waits, theirs)
    with pytest.raises(error):
        node.receive_header(FrameHeader(), 5)
    node.send(FrameHeader(FrameKind.ERROR, num_bytes=3), memoryview(b"bad"))
    node.close()
    memory.close()
    theirs.close()


def test_hostile_worker_frees_what_was_not_sent(waits: NativeWaits) -> None:
    ours, theirs = socket.socketpair()
    node = open_channel(ours, is_node=True)
    receive_attached(theirs)
    memory = ChannelMemory.receive(theirs, LAYOUT, 5)
    signal = memory.signal(3, theirs, 0)
    signal.posted = (1 << 64) - 2
    waits.post(ctypes.byref(signal))
    for step in range(10):
        node.send(FrameHeader(step=step, num_bytes=4), memoryview(b"1234"))
    node.close()
    memory.close()
    theirs.close()


def test_hostile_worker_rings_without_end(waits: NativeWaits) -> None:
    """Its doorbell does not move the deadline of what never comes."""
    ours, theirs = socket.socketpair()
    node = open_channel(ours, is_node=True)
    receive_attached(theirs)
    memory = ChannelMemory.receive(theirs, LAYOUT, 5)
    doorbell = memory.signal(0, theirs, 0).doorbell
    is_over = threading.Event()

    def ring() -> None:
        end = time.monotonic() + 60
        while not is_over.is_set() and time.monotonic() < end:
            os.eventfd_write(doorbell, 1)

    thread = threading.Thread(target=ring)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="nothing received"):
            node.receive_header(FrameHeader(), 0.3)
        assert thread.is_alive()
    finally:
        is_over.set()
        thread.join()
        node.close()
        memory.close()
        theirs.close()


def small_file() -> list[int]:
    descriptor = os.memfd_create("small", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return [descriptor] * (1 + NUM_SIGNALS)


def unsealed_file() -> list[int]:
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    return [descriptor] * (1 + NUM_SIGNALS)


def one_descriptor() -> list[int]:
    return [os.eventfd(0)]


@pytest.mark.parametrize(
    ("descriptors", "problem"),
    [
        (small_file, "4,096 bytes of shared memory"),
        (unsealed_file, "not sealed against shrinking"),
        (one_descriptor, "1 descriptors instead of shared memory"),
        (list, "0 descriptors"),
    ],
)
def test_node_passes_something_else(
    descriptors: Callable[[], list[int]], problem: str
) -> None:
    ours, theirs = socket.socketpair()
    passed = descriptors()
    socket.send_fds(theirs, [b"\0"], passed)
    with pytest.raises(ProtocolError, match=problem):
        ChannelMemory.receive(ours, LAYOUT, 5)
    for descriptor in set(passed):
        os.close(descriptor)
    ours.close()
    theirs.close()


def test_worker_is_gone_before_it_is_answered() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(OSError, match="Broken pipe"):
        open_channel(ours, is_node=True)
    ours.close()
