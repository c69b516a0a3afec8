# SPDX-License-Identifier: Apache-2.0
"""Messages between compute and memory nodes, and the version of the protocol.

Control messages are msgpack structs behind a 4-byte length. Tensors travel in frames:
a 32-byte header, then raw bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Annotated

import msgspec

from vllm_attn_offload.protocol.frames import (
    FRAME_HEADER,
    STEP_PREFIX,
    FrameFlag,
    FrameKind,
)
from vllm_attn_offload.protocol.geometry import Index, Name, SessionGeometry
from vllm_attn_offload.protocol.reasons import InvalidFrame, RefusedReason
from vllm_attn_offload.protocol.session_stats import SessionStats
from vllm_attn_offload.protocol.value_types import (
    Bytes,
    Count,
    ModelName,
    Nonce,
    Proof,
    Text,
    Token,
    Total,
)

#: One line per version: what changed on the wire.
PROTOCOL_HISTORY = (
    (1, "Hello, reservation, session, STEP / LAYER / OUT frames with row-fused q|k|v"),
    (2, "Rows that query and rows that are stored are separate; planar q, k, v"),
    (3, "Rows may lie in device memory that both sides map"),
    (4, "Counters of a session are a struct of their own"),
    (5, "Windows, caps, slopes and shared KV of layers; positions in a STEP"),
    (6, "Page faults, CPUs of nodes and workers, workers' states, where time goes"),
    (7, "Blocks of fp8, with scales of layers"),
    (8, "Names, versions, refusals; model and worker times of a session"),
    (9, "A STEP may leave half of a node's CPUs to its worker"),
)
PROTOCOL_VERSION = PROTOCOL_HISTORY[-1][0]

GIB = 1 << 30
MAX_CONTROL_BYTES = 1 << 20
HANDSHAKE_BYTES = 4 << 10


class _Message(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"
):
    """Base of every control message."""


class Hello(_Message, frozen=True, tag="hello"):
    """First message on every connection; its fields never change."""

    protocol_version: int
    compatibility_hash: Token
    peer: Name


class NodeInfo(_Message, frozen=True, tag="node_info"):
    """Answer to Hello.

    ``kv_bytes_total`` is the node's budget, ``kv_bytes_free`` what no engine holds.
    ``isa`` is empty where the kernel has none. ``instance`` is new with every start of
    the process, ``host_id`` with every boot of its host. ``unix_path`` names a socket
    where it listens, too; empty: none.
    """

    device: Text
    attention_kernel: Text
    pid: int
    kv_bytes_total: int
    kv_bytes_free: int
    name: Name
    version: Text
    isa: Text
    instance: Token
    host_id: Text
    unix_path: Text


class Challenge(_Message, frozen=True, tag="challenge"):
    """Answer to Hello of a node that asks for a token; ``nonce`` is new every time."""

    nonce: Nonce


class Authenticate(_Message, frozen=True, tag="authenticate"):
    """Answer to Challenge: proves the token, and asks the node to do the same."""

    nonce: Nonce
    proof: Proof


class Authenticated(_Message, frozen=True, tag="authenticated"):
    """Answer to Authenticate: the node's own proof, and what it is."""

    proof: Proof
    node: NodeInfo


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of an engine's attention that a session serves."""

    tp_rank: Index = 0
    tp_size: Count = 1
    node_index: Index = 0
    num_nodes: Count = 1


class ReserveCapacity(_Message, frozen=True, tag="reserve_capacity"):
    """Ask for KV memory for one worker; ``kv_bytes`` is an upper bound.

    ``model`` and ``engine_index``, the data-parallel one, are shown to operators.
    """

    engine: Token
    shard: Shard
    geometry: SessionGeometry
    kv_bytes: Bytes
    model: ModelName = ""
    engine_index: Index = 0


class CapacityReserved(_Message, frozen=True, tag="capacity_reserved"):
    """``num_blocks`` blocks of every layer fit into the reserved bytes."""

    reservation: Token
    num_blocks: int
    kv_bytes: int


class OpenSession(_Message, frozen=True, tag="open_session"):
    """Turn a reservation into a KV pool that a worker can attach to."""

    reservation: Token
    generation: Index
    num_blocks: Count
    max_num_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    max_num_reqs: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    max_blocks_per_req: Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]


class SessionOpened(_Message, frozen=True, tag="session_opened"):
    """``attach_token`` is what the worker shows to open its data channel."""

    session: Token
    attach_token: Token


class ChannelOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Resources of a worker for a data channel: CPUs, busy threads, shared memory.

    ``device`` names the GPU that it can map memory on; "": none.
    """

    cpu_ids: Annotated[list[Index], msgspec.Meta(max_length=1 << 14)]
    num_threads: Count
    shared_memory: bool
    device: Name = ""


class SlotLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shared memory of a data channel: slots each way, and bytes of their payloads."""

    num_slots: Annotated[int, msgspec.Meta(ge=1, le=64)]
    request_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    reply_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class AttachSession(_Message, frozen=True, tag="attach_session"):
    """First message of a worker: its connection becomes the session's data channel."""

    session: Token
    attach_token: Token
    generation: Index
    geometry_digest: Token
    worker_kv_bytes: Annotated[int, msgspec.Meta(ge=0)]
    offer: ChannelOffer | None = None
    worker_state_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0


class Attached(_Message, frozen=True, tag="attached"):
    """The data channel is open; frames follow.

    With ``shared_memory`` its descriptors come next and frames travel through it, else
    on the connection. The worker's waits spin for ``spin_us`` before they block.
    With ``device_memory`` that of a GPU comes behind it, with as many slots.
    """

    shared_memory: SlotLayout | None = None
    device_memory: SlotLayout | None = None
    spin_us: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0


class CloseSession(_Message, frozen=True, tag="close_session"):
    """Free a reservation and its session."""

    reservation: Token


class Closed(_Message, frozen=True, tag="closed"):
    """The reservation and everything that it held are gone."""


class GetStats(_Message, frozen=True, tag="get_stats"):
    """Ask for counters of all sessions on the node."""


class Stats(_Message, frozen=True, tag="stats"):
    """Counters of a node and its sessions.

    Page faults are those of the node's process since it serves: minor ones are first
    touches of memory, major ones waited for a disk. ``refused`` and ``invalid_frames``
    count by reason. ``frame_bytes_total`` is the budget for frames and plans.
    ``certificate_expires`` is a Unix time; 0 without TLS.
    """

    node: NodeInfo
    cpu_ids: list[int]
    sessions: list[SessionStats]
    num_minor_faults: int
    num_major_faults: int
    uptime_s: float
    num_connections: int
    refused: dict[RefusedReason, Total]
    invalid_frames: dict[InvalidFrame, Total]
    frame_bytes_total: int
    frame_bytes_free: int
    certificate_expires: float


class Ping(_Message, frozen=True, tag="ping"):
    """Liveness check."""


class Pong(_Message, frozen=True, tag="pong"):
    """Answer to Ping."""


class Error(_Message, frozen=True, tag="error"):
    """A refusal: what was given, what is allowed, what to do."""

    message: Text


Request = ReserveCapacity | OpenSession | AttachSession | CloseSession | GetStats | Ping
Reply = (
    NodeInfo
    | Challenge
    | Authenticated
    | CapacityReserved
    | SessionOpened
    | Attached
    | Closed
    | Stats
    | Pong
    | Error
)


@functools.cache
def compatibility_hash() -> str:
    """Hash of everything on which both sides must agree before they talk."""
    messages = [Hello, Authenticate, Request, Reply]
    schemas, components = msgspec.json.schema_components(messages)
    layout = [
        PROTOCOL_HISTORY,
        FRAME_HEADER.format,
        STEP_PREFIX.format,
        [(kind.name, kind.value) for kind in FrameKind],
        [(flag.name, flag.value) for flag in FrameFlag],
        schemas,
        components,
    ]
    return hashlib.sha256(msgspec.json.encode(layout, order="sorted")).hexdigest()[:32]


def version_mismatch(ours: str, theirs: Hello) -> str:
    """The sentence both sides show when their hashes differ."""
    return (
        f"protocol version {theirs.protocol_version} of {theirs.peer} does not match "
        f"version {PROTOCOL_VERSION} of {ours}. Install the same vllm-attn-offload "
        "release on the compute node and on every memory node."
    )
