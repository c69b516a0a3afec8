# SPDX-License-Identifier: Apache-2.0
"""Frames with rows in device memory that a node must refuse, and a peer that ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from host_device import HostDevice
from node_process import NodeProcess, eventually
from raw_session import (
    RawSession,
    attach_request,
    encode_step,
    make_geometry,
    reservation,
    session_of,
)
from shared_rows_node import LaggingAttention, sharing_node

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.handshake import call, connect
from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.frames import FrameFlag, FrameHeader, FrameKind
from vllm_attn_offload.protocol.messages import Attached
from vllm_attn_offload.protocol.step import StepMetadata
from vllm_attn_offload.transport.device_memory import DeviceMemoryTransport
from vllm_attn_offload.transport.negotiate import offer_channel, open_worker_channel

pytestmark = pytest.mark.skipif(load_waits() is None, reason="no C library")

GEOMETRY = make_geometry()
ROW_BYTES = (9 + 3 + 3) * 64 * 4
ON_DEVICE = FrameFlag.ON_DEVICE | FrameFlag.FUSED


@pytest.fixture
def sharing(tmp_path: Path) -> Iterator[tuple[str, LaggingAttention]]:
    with sharing_node(tmp_path) as node:
        yield node


def one_token(*, queries: int) -> StepMetadata:
    """A request's first token: stored, and attended for or not."""
    return StepMetadata.whole(
        query_start_loc=np.array([0, queries], np.int32),
        seq_lens=np.array([1], np.int32),
        slot_mapping=np.array([0], np.int64),
        block_table=np.array([[0]], np.int32),
    )


class RowsChannel:
    """A worker's channel with device memory, driven frame by frame."""

    def __init__(self, address: str) -> None:
        self.control = ControlClient(address, 10)
        reserved = self.control.reserve(reservation(GEOMETRY, 4 << 20))
        opened = self.control.open_session(session_of(reserved.reservation, 8))
        sock, _ = connect(address, 10)
        self.device = HostDevice()
        request = msgspec.structs.replace(
            attach_request(opened, GEOMETRY),
            offer=offer_channel(sock, 1, self.device),
        )
        attached = call(sock, address, request, Attached, 10)
        transport = open_worker_channel(
            sock, attached, timeout_s=10, device=self.device
        )
        assert isinstance(transport, DeviceMemoryTransport)
        self.transport = transport

    def send_step(self, step: StepMetadata) -> None:
        payload = encode_step(step)
        header = FrameHeader(FrameKind.STEP, step=1, num_bytes=payload.nbytes)
        self.transport.send(header, payload)

    def send_layer(self, flags: int, num_bytes: int) -> None:
        rows = self.transport.rows_buffer(ROW_BYTES)
        rows.zero_()
        header = FrameHeader(FrameKind.LAYER, step=1, flags=flags, num_bytes=num_bytes)
        self.transport.send(header)

    def receive(self) -> FrameHeader:
        header = FrameHeader()
        self.transport.receive_header(header, 10)
        return header

    def close(self) -> None:
        self.transport.close()
        self.control.close()


def test_layer_is_answered_in_device_memory(
    sharing: tuple[str, LaggingAttention],
) -> None:
    channel = RowsChannel(sharing[0])
    channel.send_step(one_token(queries=1))
    channel.send_layer(ON_DEVICE, ROW_BYTES)
    header = channel.receive()
    assert header.kind == FrameKind.OUT
    assert header.flags & FrameFlag.ON_DEVICE
    assert not channel.transport.receive_rows(header.num_bytes).any()
    channel.close()


def test_memory_holds_no_data_of_others(sharing: tuple[str, LaggingAttention]) -> None:
    """The device hands out what others left there; a worker maps all of it."""
    channel = RowsChannel(sharing[0])
    (memory,) = channel.device.memory
    assert not memory.bytes.any()
    channel.close()


def test_a_layer_of_several_launches(sharing: tuple[str, LaggingAttention]) -> None:
    address, attention = sharing
    attention.num_launches = 5
    channel = RowsChannel(address)
    channel.send_step(one_token(queries=1))
    channel.send_layer(ON_DEVICE, ROW_BYTES)
    assert channel.receive().kind == FrameKind.OUT
    assert attention.num_calls == 1
    channel.close()


def test_a_closed_channel_ends_a_layer_of_many_launches(
    sharing: tuple[str, LaggingAttention],
) -> None:
    """The worker's engine is still there; nobody waits for the layer."""
    address, attention = sharing
    attention.num_launches = 1 << 62
    channel = RowsChannel(address)
    (memory,) = attention.shared_device.memory
    channel.send_step(one_token(queries=1))
    channel.send_layer(ON_DEVICE, ROW_BYTES)
    channel.transport.close()
    assert eventually(lambda: memory.descriptor == -1, 30)
    assert not attention.num_calls
    channel.control.close()


@pytest.mark.parametrize(
    ("flags", "num_bytes", "queries"),
    [
        (ON_DEVICE | FrameFlag.WANT_LSE, ROW_BYTES, 1),
        (ON_DEVICE, ROW_BYTES - 4, 1),
        (ON_DEVICE, ROW_BYTES + 4, 1),
        (ON_DEVICE, 1 << 20, 1),
        (FrameFlag.ON_DEVICE, 2 * 3 * 64 * 4, 0),
    ],
    ids=["lse", "short", "long", "huge", "only-stored"],
)
def test_refused_frames(
    sharing: tuple[str, LaggingAttention], flags: int, num_bytes: int, queries: int
) -> None:
    """The session ends with an ERROR in host memory, and gives its memory back."""
    address, attention = sharing
    channel = RowsChannel(address)
    channel.send_step(one_token(queries=queries))
    channel.send_layer(flags, num_bytes)
    header = channel.receive()
    assert header.kind == FrameKind.ERROR
    assert not header.flags
    assert bytes(channel.transport.receive_payload(header.num_bytes)) != b""
    assert not attention.num_calls
    channel.close()
    (memory,) = attention.shared_device.memory
    assert eventually(lambda: memory.descriptor == -1)


def test_channel_without_device_memory(node: NodeProcess) -> None:
    """No node on a CPU has any, whatever a worker says."""
    session = RawSession(node.address, GEOMETRY, 8)
    session.send_step(one_token(queries=1))
    header = FrameHeader(FrameKind.LAYER, step=1, flags=ON_DEVICE, num_bytes=ROW_BYTES)
    session.send(header)
    kind, message = session.receive()
    assert kind == FrameKind.ERROR
    assert b"rows in device memory" in message
    session.close()


def test_slots_follow_the_session(sharing: tuple[str, LaggingAttention]) -> None:
    """Rows of its largest decode step, each way, in every slot."""
    channel = RowsChannel(sharing[0])
    assert channel.transport.fits(64 * ROW_BYTES)
    assert not channel.transport.fits(64 * ROW_BYTES + 1)
    channel.close()
