# SPDX-License-Identifier: Apache-2.0
"""The memory node's process: listens, shakes hands, and gives sessions their pools."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.memory_node.capacity import GIB, CapacityError, CapacityLedger
from vllm_attn_offload.memory_node.decode_attention.base import (
    DTYPE_BYTES,
    DecodeAttention,
    RowLayout,
)
from vllm_attn_offload.memory_node.kv_cache import bytes_per_block
from vllm_attn_offload.memory_node.session import Session
from vllm_attn_offload.memory_node.step import step_num_bytes
from vllm_attn_offload.protocol import (
    HANDSHAKE_BYTES,
    MAX_CONTROL_BYTES,
    Attached,
    AttachSession,
    CapacityReserved,
    Closed,
    CloseSession,
    Error,
    GetStats,
    Hello,
    NodeInfo,
    OpenSession,
    Ping,
    Pong,
    Reply,
    Request,
    ReserveCapacity,
    SessionGeometry,
    SessionOpened,
    Stats,
    compatibility_hash,
    version_mismatch,
)
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.control import (
    message_decoder,
    receive_message,
    send_message,
)
from vllm_attn_offload.transport.tcp import TcpTransport

logger = logging.getLogger(__name__)

_HANDSHAKE_TIMEOUT_S = 5.0
_MESSAGE_TIMEOUT_S = 10.0
_STALL_TIMEOUT_S = 30.0
_MAX_CONNECTIONS = 512
_MAX_FRAME_BYTES = 1 << 30

_hello_decoder = message_decoder(Hello)
_request_decoder = message_decoder(Request)


@dataclass(slots=True)
class _Reservation:
    request: ReserveCapacity
    num_blocks: int
    kv_bytes: int
    attach_token: str = ""
    session: Session | None = None


class MemoryNode:
    """Serves KV pools and attention to any number of engines.

    Args:
        address: Where to listen.
        attention: The kernel that attends.
        device: What the node runs on, as shown to users.
        kv_bytes: Budget for KV blocks of all engines.

    Raises:
        OSError: The address cannot be bound.
    """

    def __init__(
        self, address: Address, attention: DecodeAttention, device: str, kv_bytes: int
    ) -> None:
        self._attention = attention
        self._device = device
        self._ledger = CapacityLedger(kv_bytes)
        self._compute_lock = threading.Lock()
        self._lock = threading.Lock()
        self._reservations: dict[str, _Reservation] = {}
        self._connections: set[socket.socket] = set()
        self._listener = address.listen()
        port = 0 if address.path else self._listener.getsockname()[1]
        self.address = Address(address.host, port, address.path)

    def start(self) -> None:
        """Accept connections in the background."""
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def stop(self) -> None:
        """Stop listening, end every connection and free every pool."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self.address.path:
            Path(self.address.path).unlink(missing_ok=True)
        with self._lock:
            connections, reservations = (
                list(self._connections),
                list(self._reservations),
            )
        for sock in connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for reservation in reservations:
            self._release(reservation)

    def info(self) -> NodeInfo:
        """What the node is and how much of it is free."""
        return NodeInfo(
            device=self._device,
            attention_kernel=self._attention.name,
            pid=os.getpid(),
            kv_bytes_total=self._ledger.total_bytes,
            kv_bytes_free=self._ledger.free_bytes,
        )

    def stats(self) -> Stats:
        """Counters of the node's sessions."""
        with self._lock:
            sessions = [r.session for r in self._reservations.values() if r.session]
        return Stats(node=self.info(), sessions=[s.stats() for s in sessions])

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if len(self._connections) >= _MAX_CONNECTIONS:
                logger.warning(
                    "refused a connection: %d are open already", _MAX_CONNECTIONS
                )
                sock.close()
                continue
            self._connections.add(sock)
            threading.Thread(
                target=self._serve_connection, args=(sock,), daemon=True
            ).start()

    def _serve_connection(self, sock: socket.socket) -> None:
        owned: list[str] = []
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = self._shake_hands(sock)
            if peer:
                self._serve_requests(sock, owned)
        except ProtocolError as error:
            logger.warning("closed a connection: it sent %s", error)
        except OSError as error:
            logger.debug("a connection ended: %s", error)
        finally:
            for reservation in owned:
                self._release(reservation)
            self._connections.discard(sock)
            sock.close()

    def _shake_hands(self, sock: socket.socket) -> str:
        """Compare protocol versions; the peer's name, or "" if they do not match."""
        hello = receive_message(
            sock,
            _hello_decoder,
            max_bytes=HANDSHAKE_BYTES,
            timeout_s=_HANDSHAKE_TIMEOUT_S,
        )
        if hello.compatibility_hash != compatibility_hash():
            sentence = version_mismatch("this memory node", hello)
            logger.warning("refused a connection: %s", sentence)
            send_message(sock, Error(sentence), _MESSAGE_TIMEOUT_S)
            return ""
        send_message(sock, self.info(), _MESSAGE_TIMEOUT_S)
        return hello.peer or "unnamed peer"

    def _serve_requests(self, sock: socket.socket, owned: list[str]) -> None:
        while True:
            request = receive_message(
                sock,
                _request_decoder,
                max_bytes=MAX_CONTROL_BYTES,
                timeout_s=_MESSAGE_TIMEOUT_S,
                idle_s=None,
            )
            if isinstance(request, AttachSession):
                self._serve_data_channel(sock, request)
                return
            send_message(sock, self._answer(request, owned), _MESSAGE_TIMEOUT_S)

    def _answer(self, request: Request, owned: list[str]) -> Reply:
        try:
            match request:
                case ReserveCapacity():
                    return self._reserve(request, owned)
                case OpenSession():
                    return self._open(request, owned)
                case CloseSession():
                    return self._close(request, owned)
                case GetStats():
                    return self.stats()
                case Ping():
                    return Pong()
                case _:
                    return Error(f"{type(request).__name__} is not allowed here")
        except (CapacityError, ValueError) as error:
            logger.warning("refused a reservation: %s", error)
            return Error(str(error))

    def _reserve(self, request: ReserveCapacity, owned: list[str]) -> Reply:
        if problem := _geometry_problem(request):
            return Error(problem)
        block_bytes = bytes_per_block(request.geometry, self._attention)
        num_blocks = request.kv_bytes // block_bytes
        if num_blocks < 1:
            return Error(
                f"{request.kv_bytes:,} bytes of KV cache hold no block of "
                f"{block_bytes:,} bytes. Raise kv_cache_gib."
            )
        reservation = secrets.token_hex(8)
        kv_bytes = num_blocks * block_bytes
        self._ledger.reserve(reservation, kv_bytes)
        with self._lock:
            self._reservations[reservation] = _Reservation(
                request, num_blocks, kv_bytes
            )
        owned.append(reservation)
        logger.info(
            "reserved %.2f GiB (%d blocks) for engine %s rank %d; %.2f GiB stay free",
            kv_bytes / GIB,
            num_blocks,
            request.engine,
            request.shard.tp_rank,
            self._ledger.free_bytes / GIB,
        )
        return CapacityReserved(reservation, num_blocks, kv_bytes)

    def _open(self, request: OpenSession, owned: list[str]) -> Reply:
        entry = self._reservations.get(request.reservation)
        if request.reservation not in owned or entry is None or entry.session:
            return Error("this connection has no such unopened reservation")
        if request.num_blocks > entry.num_blocks:
            asked = request.num_blocks * entry.kv_bytes // entry.num_blocks
            return Error(
                f"a pool of {request.num_blocks:,} blocks needs {asked / GIB:.2f} GiB, "
                f"but {entry.kv_bytes / GIB:.2f} GiB are reserved. Raise kv_cache_gib "
                "or lower num_gpu_blocks_override."
            )
        if problem := _limits_problem(entry.request.geometry, request):
            return Error(problem)
        entry.session = Session(
            entry.request, request, self._attention, self._compute_lock
        )
        entry.attach_token = secrets.token_hex(16)
        logger.info(
            "opened session %s: engine %s rank %d, %d layers, %d blocks",
            request.reservation,
            entry.request.engine,
            entry.request.shard.tp_rank,
            len(entry.request.geometry.layers),
            request.num_blocks,
        )
        return SessionOpened(request.reservation, entry.attach_token)

    def _close(self, request: CloseSession, owned: list[str]) -> Reply:
        if request.reservation not in owned:
            return Error("this connection has no such reservation")
        owned.remove(request.reservation)
        self._release(request.reservation)
        return Closed()

    def _release(self, reservation: str) -> None:
        with self._lock:
            entry = self._reservations.pop(reservation, None)
        if entry is None:
            return
        if entry.session is not None:
            entry.session.close()
        self._ledger.release(reservation)
        logger.info(
            "released engine %s rank %d; %.2f GiB are free",
            entry.request.engine,
            entry.request.shard.tp_rank,
            self._ledger.free_bytes / GIB,
        )

    def _serve_data_channel(self, sock: socket.socket, request: AttachSession) -> None:
        with self._lock:
            entry = self._reservations.get(request.session)
            problem = _attach_problem(entry, request)
            if entry is not None and not problem:
                entry.attach_token = ""
        if problem or entry is None or (session := entry.session) is None:
            logger.warning("refused a data channel: %s", problem)
            send_message(sock, Error(problem), _MESSAGE_TIMEOUT_S)
            return
        session.worker_kv_bytes = request.worker_kv_bytes
        send_message(sock, Attached(), _MESSAGE_TIMEOUT_S)
        transport = TcpTransport(sock, stall_timeout_s=_STALL_TIMEOUT_S)
        try:
            session.serve(transport)
        finally:
            transport.close()


def _limits_problem(geometry: SessionGeometry, request: OpenSession) -> str:
    """Frames may be as long as a session's limits allow, so these are bounded first."""
    row_bytes = DTYPE_BYTES[geometry.dtype] * max(
        RowLayout.of(layer).width for layer in geometry.layers
    )
    step_bytes = step_num_bytes(
        request.max_num_reqs, request.max_num_tokens, request.max_blocks_per_req
    )
    longest = max(step_bytes, request.max_num_tokens * row_bytes)
    if longest > _MAX_FRAME_BYTES:
        return (
            f"frames of up to {longest / GIB:.2f} GiB were asked for; at most "
            f"{_MAX_FRAME_BYTES / GIB:.0f} GiB are allowed. Lower max_num_seqs, "
            "max_num_batched_tokens or max_model_len."
        )
    return ""


def _attach_problem(entry: _Reservation | None, request: AttachSession) -> str:
    if entry is None or entry.session is None:
        return f"there is no open session {request.session!r}"
    ours, theirs = entry.attach_token.encode(), request.attach_token.encode()
    if not hmac.compare_digest(ours, theirs):
        return "the attach token is wrong or was used before"
    if entry.session.generation != request.generation:
        return (
            f"generation {request.generation} of the session is over; "
            f"{entry.session.generation} is current"
        )
    if entry.session.geometry.digest() != request.geometry_digest:
        return (
            "the worker's attention layers differ from the session's (heads, head "
            "sizes, block size or dtype). Use the same model and vLLM version in all "
            "ranks of an engine."
        )
    return ""


def _geometry_problem(request: ReserveCapacity) -> str:
    geometry = request.geometry
    for layer in geometry.layers:
        if layer.group >= len(geometry.groups):
            return f"layer {layer.name} names KV group {layer.group}, which is missing"
        if layer.num_query_heads % layer.num_kv_heads:
            return (
                f"layer {layer.name} has {layer.num_query_heads} query heads for "
                f"{layer.num_kv_heads} KV heads; it must be a multiple"
            )
    if len(geometry.groups) > 1:
        return (
            f"{len(geometry.groups)} KV groups were given; this release serves 1. "
            "Use a model whose layers all use full attention."
        )
    if request.shard.num_nodes > 1:
        return (
            f"{request.shard.num_nodes} memory nodes were given; this release serves "
            "an engine from 1."
        )
    return ""
