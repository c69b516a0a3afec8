# SPDX-License-Identifier: Apache-2.0
"""Every transport through the same contract: sizes, buffers, deadlines, lost peers."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from channel_pairs import STALL_TIMEOUT_S, Channels, pattern

from vllm_attn_offload.protocol.frames import FrameHeader, FrameKind
from vllm_attn_offload.transport.base import Transport


def echo(channel: Transport, num_frames: int) -> None:
    header = FrameHeader()
    for _ in range(num_frames):
        channel.receive_header(header, 5)
        channel.send(header, channel.receive_payload(header.num_bytes))


def send_numbered(channel: Transport, begin: int, end: int, num_bytes: int) -> None:
    """Send frames with their number as step and seed, built in the channel's memory."""
    for number in range(begin, end):
        buffer = channel.payload_buffer(num_bytes)
        buffer[:] = pattern(num_bytes, number)
        header = FrameHeader(FrameKind.LAYER, step=number, num_bytes=num_bytes)
        channel.send(header, buffer)


def check_numbered(channel: Transport, begin: int, end: int, num_bytes: int) -> None:
    header = FrameHeader()
    for number in range(begin, end):
        channel.receive_header(header, 5)
        assert (header.step, header.num_bytes) == (number, num_bytes)
        assert channel.receive_payload(num_bytes) == pattern(num_bytes, number)


def test_frames_both_ways(channels: Channels) -> None:
    ours, theirs = channels
    sizes = [0, 1, 4 << 10, 8 << 20, 1, 0]
    with ThreadPoolExecutor() as executor:
        echoed = executor.submit(echo, theirs, len(sizes))
        received = FrameHeader()
        for number, size in enumerate(sizes):
            payload = pattern(size, number)
            sent = FrameHeader(
                FrameKind.LAYER,
                layer=number,
                step=(1 << 63) + number,
                micro_batch=2,
                group=3,
                flags=1,
                num_bytes=size,
            )
            ours.send(sent, memoryview(payload))
            ours.receive_header(received, 5)
            assert received == sent
            target = memoryview(bytearray(size))
            ours.receive_payload_into(target)
            assert target == payload
        echoed.result(5)


def test_send_several_parts(channels: Channels) -> None:
    """The parts of a payload arrive as one, also where the kernel takes a bit."""
    ours, theirs = channels
    parts = [pattern(n, n) for n in (0, 5, 3 << 20, 0, 3, 3 << 20)]
    header = FrameHeader(FrameKind.OUT, num_bytes=sum(map(len, parts)))
    with ThreadPoolExecutor() as executor:
        sent = executor.submit(ours.send, header, *map(memoryview, parts))
        received = FrameHeader()
        theirs.receive_header(received, 5)
        assert theirs.receive_payload(received.num_bytes) == b"".join(parts)
        sent.result(5)


def test_payload_buffer_frames_in_flight(channels: Channels) -> None:
    """More frames than slots, some unread: no buffer is lent before it was received."""
    ours, theirs = channels
    for begin in range(0, 30, 3):
        send_numbered(ours, begin, begin + 3, 1000 + begin)
        check_numbered(theirs, begin, begin + 3, 1000 + begin)


def test_payload_buffer_not_sent(channels: Channels) -> None:
    """A buffer that was asked for and given up does no harm."""
    ours, theirs = channels
    ours.payload_buffer(64)[:] = pattern(64, 1)
    send_numbered(ours, 2, 3, 100)
    ours.payload_buffer(8)
    header = FrameHeader(step=3, num_bytes=5)
    ours.send(header, memoryview(pattern(5, 3)))
    check_numbered(theirs, 2, 3, 100)
    check_numbered(theirs, 3, 4, 5)


def test_threads_send_and_receive_at_once(channels: Channels) -> None:
    """Both ways at the same time, the senders ahead as far as the channel lets them."""
    ours, theirs = channels
    with ThreadPoolExecutor(4) as executor:
        running = [
            executor.submit(send_numbered, ours, 0, 400, 3000),
            executor.submit(send_numbered, theirs, 1000, 1400, 2000),
            executor.submit(check_numbered, theirs, 0, 400, 3000),
            executor.submit(check_numbered, ours, 1000, 1400, 2000),
        ]
        for future in running:
            future.result(30)


def test_receive_header_deadline(channels: Channels) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nothing received for 0\.8 s"):
        channels[0].receive_header(FrameHeader(), 0.8)
    assert 0.7 < time.monotonic() - started < 5


def test_send_peer_takes_nothing(channels: Channels) -> None:
    payload = memoryview(bytes(8 << 20))

    def send_all() -> None:
        for _ in range(16):
            channels[0].send(FrameHeader(num_bytes=payload.nbytes), payload)

    started = time.monotonic()
    with pytest.raises(TimeoutError, match="takes no data"):
        send_all()
    assert time.monotonic() - started < STALL_TIMEOUT_S + 10


def test_receive_peer_closed(channels: Channels) -> None:
    """What was sent before the end arrives before it."""
    ours, theirs = channels
    send_numbered(ours, 0, 1, 500)
    ours.close()
    ours.close()
    check_numbered(theirs, 0, 1, 500)
    with pytest.raises(ConnectionError, match="closed the connection"):
        theirs.receive_header(FrameHeader(), 5)


def test_send_peer_closed(channels: Channels) -> None:
    ours, theirs = channels
    theirs.close()
    payload = memoryview(bytes(1 << 20))

    def send_all() -> None:
        for _ in range(16):
            ours.send(FrameHeader(num_bytes=payload.nbytes), payload)

    with pytest.raises(ConnectionError):
        send_all()


def test_close_wakes_both_threads(channels: Channels) -> None:
    ours, _ = channels
    with ThreadPoolExecutor(2) as executor:
        receiving = executor.submit(ours.receive_header, FrameHeader(), None)
        sending = executor.submit(send_numbered, ours, 0, 1 << 20, 8 << 20)
        time.sleep(0.1)
        ours.close()
        for waiting in (receiving, sending):
            assert isinstance(waiting.exception(5), OSError)


def test_closed_channel(channels: Channels) -> None:
    ours, _ = channels
    ours.close()
    with pytest.raises(OSError, match="closed|Bad file"):
        ours.receive_header(FrameHeader(), None)
    with pytest.raises(OSError, match="closed|Bad file"):
        ours.send(FrameHeader())


def test_receive_while_another_thread_computes(channels: Channels) -> None:
    """A wait leaves the GIL to the thread that ends it."""
    ours, theirs = channels
    thread = threading.Timer(0.05, send_numbered, (theirs, 7, 8, 10))
    thread.start()
    check_numbered(ours, 7, 8, 10)
    thread.join()
