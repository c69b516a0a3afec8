# SPDX-License-Identifier: Apache-2.0
"""Handshake, capacity and data-channel rules of a running node."""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace as replace_dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
from node_process import NodeProcess, eventually, running_node
from paged_batch import PagedBatch
from raw_session import (
    RawSession,
    attach_request,
    make_geometry,
    reservation,
    session_of,
)

from vllm_attn_offload import __version__
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.handshake import call, connect
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.geometry import KVGroup
from vllm_attn_offload.protocol.messages import (
    PROTOCOL_VERSION,
    Attached,
    AttachSession,
    Hello,
    NodeInfo,
    OpenSession,
    Ping,
    Pong,
    ReserveCapacity,
    SessionOpened,
)
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.transport.address import Address

MIB = 1 << 20
# make_geometry: 2 layers of 16 tokens with 3 heads of 64 + 64 floats.
BLOCK_BYTES = 2 * 16 * 3 * 128 * 4


@pytest.fixture
def control(node: NodeProcess) -> Iterator[ControlClient]:
    """A control channel; what the test reserves is freed with it."""
    client = ControlClient(node.address, 5)
    total = client.info.kv_bytes_total
    assert eventually(lambda: client.refresh_info().kv_bytes_free == total)
    yield client
    client.close()
    with closing(ControlClient(node.address, 5)) as other:
        assert eventually(lambda: other.refresh_info().kv_bytes_free == total)


def open_session(control: ControlClient, num_blocks: int = 4) -> SessionOpened:
    reserved = control.reserve(reservation(make_geometry(), num_blocks * BLOCK_BYTES))
    return control.open_session(session_of(reserved.reservation, num_blocks))


def attach(address: str, request: AttachSession) -> socket.socket:
    sock, _ = connect(address, 5)
    try:
        call(sock, address, request, Attached, 5)
    except MemoryNodeError:
        sock.close()
        raise
    return sock


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_reqs": 1 << 16, "max_blocks_per_req": 1 << 20},
        {"max_num_tokens": 1 << 20},
    ],
    ids=["step", "layer"],
)
def test_frames_are_bounded(control: ControlClient, limits: dict[str, int]) -> None:
    """A session cannot make the node allocate what its limits would allow."""
    geometry = make_geometry()
    reserved = control.reserve(reservation(geometry, 4 * BLOCK_BYTES))
    request = msgspec.structs.replace(session_of(reserved.reservation, 4), **limits)
    with pytest.raises(MemoryNodeError, match="frames of up to .* at most 1 GiB"):
        control.open_session(request)
    assert control.open_session(session_of(reserved.reservation, 4)).session


def test_info(node: NodeProcess, control: ControlClient) -> None:
    assert control.info == NodeInfo(
        device="cpu",
        attention_kernel=control.info.attention_kernel,
        pid=node.process.pid,
        kv_bytes_total=256 * MIB,
        kv_bytes_free=256 * MIB,
        name=f"{socket.gethostname()}/node",
        version=__version__,
        isa=control.info.isa,
        instance=control.info.instance,
        host_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        unix_path=node.address.removeprefix("unix:"),
    )
    assert control.info.attention_kernel


def test_version_mismatch(node: NodeProcess) -> None:
    """Both sides show the same sentence, and the node serves on."""
    theirs = Hello(99, "another-hash", "vllm-attn-offload 9.9")
    sentence = (
        "protocol version 99 of vllm-attn-offload 9.9 does not match version "
        f"{PROTOCOL_VERSION} of this memory node. Install the same vllm-attn-offload "
        "release on the compute node and on every memory node."
    )
    with (
        Address.parse(node.address).connect(5) as sock,
        pytest.raises(MemoryNodeError, match=sentence),
    ):
        call(sock, node.address, theirs, NodeInfo, 5)
    assert eventually(lambda: sentence in node.log())


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /metrics HTTP/1.1\r\n\r\n",
        struct.pack("<I", 1 << 31),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
    ],
)
def test_garbage_instead_of_hello(node: NodeProcess, sent: bytes) -> None:
    with Address.parse(node.address).connect(5) as sock:
        sock.sendall(sent)
        # Reset where the node closed with some of it unread.
        with suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    with closing(ControlClient(node.address, 5)) as other:
        assert other.info.pid == node.process.pid
    assert eventually(lambda: "it sent a control message of" in node.log())


def test_names_forge_no_log_lines(node: NodeProcess, control: ControlClient) -> None:
    forged = msgspec.structs.replace(
        reservation(make_geometry(), MIB), engine="a\nERROR forged"
    )
    with (
        closing(ControlClient(node.address, 5)) as client,
        pytest.raises(MemoryNodeError, match="the connection broke"),
    ):
        client.reserve(forged)
    assert eventually(lambda: "not an allowed control message" in node.log())
    assert "forged" not in node.log()


def test_peers_forge_no_log_lines(node: NodeProcess) -> None:
    """What decoders quote of a message is escaped."""
    sock, _ = connect(node.address, 5)
    name = b"x\n(MemoryNode) ERROR forged\x1b[31m"
    sent = b"\x82\xa4type\xa4ping" + b"\xd9" + bytes([len(name)]) + name + b"\x01"
    with sock:
        sock.sendall(len(sent).to_bytes(4, "little") + sent)
    assert eventually(lambda: r"x\n(MemoryNode) ERROR forged\x1b[31m" in node.log())
    assert "\x1b" not in node.log()


def test_strangers_do_not_silence_engines(tmp_path: Path) -> None:
    with running_node(tmp_path, "--kv-cache-gib", "0.1") as node:
        for _ in range(700):
            with Address.parse(node.address).connect(5) as sock:
                sock.sendall(b"\xff" * 8)
                with suppress(ConnectionResetError):
                    assert sock.recv(1) == b""
        assert 500 <= node.log().count("closed a connection") < 700
        with closing(ControlClient(node.address, 5)) as engine:
            engine.reserve(reservation(make_geometry(), MIB))
        assert "reserved 0.00 GiB" in node.log()


def test_ping(node: NodeProcess) -> None:
    sock, _ = connect(node.address, 5)
    with sock:
        assert call(sock, node.address, Ping(), Pong, 5) == Pong()


def test_reserve_more_than_is_left(node: NodeProcess, control: ControlClient) -> None:
    with closing(ControlClient(node.address, 5)) as first:
        held = first.reserve(reservation(make_geometry(), 192 * MIB))
        assert held.kv_bytes == held.num_blocks * BLOCK_BYTES <= 192 * MIB
        with pytest.raises(MemoryNodeError) as error:
            control.reserve(reservation(make_geometry(), 128 * MIB))
        assert "0.12 GiB of KV cache were asked for" in str(error.value)
        assert "only 64.00 MiB of 0.25 GiB are free" in str(error.value)
        assert "refused ReserveCapacity: 0.12 GiB" in node.log()
        left = control.reserve(reservation(make_geometry(), 63 * MIB))
        control.close_session(left.reservation)
    # The first engine's connection is gone, and what it held with it.
    free = 256 * MIB
    assert eventually(lambda: control.refresh_info().kv_bytes_free == free)
    control.reserve(reservation(make_geometry(), 128 * MIB))


def with_layers(**changes: Any) -> dict[str, Any]:
    """A geometry whose last layer is changed."""
    geometry = make_geometry()
    first, last = geometry.layers
    layers = [first, msgspec.structs.replace(last, **changes)]
    return {"geometry": msgspec.structs.replace(geometry, layers=layers)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_bytes": BLOCK_BYTES - 1}, "hold no block of 49,152 bytes"),
        (
            {"geometry": make_geometry(num_query_heads=8, num_kv_heads=3)},
            "8 query heads for 3 KV heads; it must be a multiple",
        ),
        (
            {
                "geometry": msgspec.structs.replace(
                    make_geometry(), groups=[KVGroup(16), KVGroup(16)]
                )
            },
            "KV group 1 has no layer; each must have one",
        ),
        (
            with_layers(alibi_slopes=(0.5,)),
            "1 ALiBi slopes for 9 query heads; one each",
        ),
        (with_layers(soft_cap=math.inf), "that is not finite; all must be"),
        (with_layers(softmax_scale=math.nan), "that is not finite; all must be"),
        (
            with_layers(storage=0),
            "layers.1.attn of KV group 0 both store into storage 0",
        ),
        (
            with_layers(stores=False),
            "reads storage 1, into which no layer of KV group 0",
        ),
        (
            with_layers(stores=False, storage=0, num_kv_heads=9),
            r"reads KV heads and head sizes \(9, 64, 64\), and layer layers.0.attn",
        ),
    ],
    ids=[
        *("less than a block", "heads", "groups", "slopes", "cap", "scale"),
        *("two stores", "no store", "other heads"),
    ],
)
def test_reserve_refuses(
    control: ControlClient, changes: dict[str, Any], message: str
) -> None:
    request: ReserveCapacity = msgspec.structs.replace(
        reservation(make_geometry(), MIB), **changes
    )
    with pytest.raises(MemoryNodeError, match=message):
        control.reserve(request)


def test_reserve_refuses_a_missing_group(control: ControlClient) -> None:
    geometry = make_geometry()
    layers = [msgspec.structs.replace(layer, group=1) for layer in geometry.layers]
    geometry = msgspec.structs.replace(geometry, layers=layers)
    with pytest.raises(MemoryNodeError, match="names KV group 1, which is missing"):
        control.reserve(reservation(geometry, MIB))


def test_open_session_refuses(node: NodeProcess, control: ControlClient) -> None:
    reserved = control.reserve(reservation(make_geometry(), 4 * BLOCK_BYTES))
    fitting: OpenSession = session_of(reserved.reservation, reserved.num_blocks)
    with pytest.raises(MemoryNodeError, match=r"5 blocks needs .* GiB are reserved"):
        control.open_session(msgspec.structs.replace(fitting, num_blocks=5))
    with (
        closing(ControlClient(node.address, 5)) as stranger,
        pytest.raises(MemoryNodeError, match="no such unopened reservation"),
    ):
        stranger.open_session(fitting)
    control.open_session(fitting)
    with pytest.raises(MemoryNodeError, match="no such unopened reservation"):
        control.open_session(fitting)


def test_attach_token_serves_once(node: NodeProcess, control: ControlClient) -> None:
    opened = open_session(control)
    request = attach_request(opened, make_geometry())
    wrong = "the attach token is wrong or was used before"
    guess = msgspec.structs.replace(request, attach_token="0" * 32)
    with pytest.raises(MemoryNodeError, match=wrong):
        attach(node.address, guess)
    with attach(node.address, request):
        with pytest.raises(MemoryNodeError, match=wrong):
            attach(node.address, request)
        (stats,) = control.stats().sessions
        assert (stats.num_blocks, stats.kv_bytes) == (4, 4 * BLOCK_BYTES)
    assert f"refused a data channel: {wrong}" in node.log()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"session": "0123"}, "there is no open session '0123'"),
        ({"generation": 1}, "generation 1 of the session is over; 0 is current"),
        (
            {"geometry_digest": make_geometry(block_size=32).digest()},
            "the worker's attention layers differ from the session's",
        ),
    ],
    ids=["session", "generation", "geometry"],
)
def test_attach_refuses(
    node: NodeProcess,
    control: ControlClient,
    changes: dict[str, Any],
    message: str,
) -> None:
    """The worker raises and the node logs the same sentence; the token stays good."""
    request = attach_request(open_session(control), make_geometry())
    with pytest.raises(MemoryNodeError, match=message):
        attach(node.address, msgspec.structs.replace(request, **changes))
    assert f"refused a data channel: {message}" in node.log()
    attach(node.address, request).close()


def test_close_session_ends_the_data_channel(
    node: NodeProcess, control: ControlClient
) -> None:
    opened = open_session(control)
    with attach(node.address, attach_request(opened, make_geometry())) as sock:
        control.close_session(opened.session)
        assert sock.recv(1) == b""
    assert control.stats().sessions == []
    with pytest.raises(MemoryNodeError, match="no such reservation"):
        control.close_session(opened.session)


def test_new_session_sees_no_old_data(node: NodeProcess) -> None:
    """Blocks are blank before another engine gets them."""
    geometry = make_geometry()
    batch = PagedBatch(geometry, 4, 1)
    step, qkv = batch.grow([64])
    with closing(RawSession(node.address, geometry, 4)) as session:
        session.send_step(step)
        session.attend(0, qkv)
    reader = replace_dataclass(step, slot_mapping=step.slot_mapping * 0 - 1)
    with closing(RawSession(node.address, geometry, 4)) as session:
        session.send_step(reader)
        out, _ = session.attend(0, qkv)
    assert torch.count_nonzero(out) == 0


def test_stats_count_what_was_served(node: NodeProcess) -> None:
    geometry = make_geometry()
    batch = PagedBatch(geometry, 8, 1)
    with closing(RawSession(node.address, geometry, 8)) as session:
        num_bytes = 0
        for num_new in ([20], [1]):
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            for layer in (0, 1):
                out, _ = session.attend(layer, qkv)
                num_bytes += out.nbytes
        # The node counts after it has sent.
        assert eventually(lambda: counters(session).num_layer_calls == 4)
        assert eventually(lambda: is_all_of_it(counters(session)))
        stats = counters(session)
    assert (stats.num_steps, stats.bytes_sent) == (2, num_bytes)
    assert stats.num_attended_tokens == 2 * (20 + 21)
    assert stats.store_s > 0
    assert stats.attend_s > 0
    assert stats.plan_s > 0


def is_all_of_it(stats: SessionCounters) -> bool:
    """Whether the time of layers covers that of their parts."""
    parts = (stats.receive_s, stats.queue_s, stats.store_s, stats.attend_s)
    return stats.layer_s >= sum(parts) + stats.send_s


def test_cpu_time_is_that_of_the_serving_thread(node: NodeProcess) -> None:
    """It is read while the thread works, and stays when the worker is gone."""
    geometry = make_geometry()
    batch, num_ended = PagedBatch(geometry, 8, 1), node.log().count("data channel of")
    with closing(RawSession(node.address, geometry, 8)) as session:
        seen = [counters(session).cpu_s]
        for _ in range(10):
            step, qkv = batch.grow([1])
            session.send_step(step)
            session.attend(0, qkv)
            seen.append(counters(session).cpu_s)
        session.transport.close()
        assert eventually(lambda: node.log().count("data channel of") > num_ended)
        seen += [counters(session).cpu_s for _ in range(2)]
    whole = psutil.Process(node.process.pid).cpu_times()
    assert seen == sorted(seen)
    assert 0 < seen[-1] <= whole.user + whole.system + 0.1


def counters(session: RawSession) -> SessionCounters:
    (stats,) = session.control.stats().sessions
    return stats.counters
