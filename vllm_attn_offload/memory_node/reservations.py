# SPDX-License-Identifier: Apache-2.0
"""Reserved memory and open sessions of all engines, and who may attach to them."""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
from dataclasses import dataclass
from typing import Any

from vllm_attn_offload.memory_node.capacity import CapacityError, CapacityLedger
from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.memory_node.fair_lock import FairLock
from vllm_attn_offload.memory_node.frame_budget import ENGINE_SHARE, FrameBudget
from vllm_attn_offload.memory_node.frame_sizes import FrameSizes
from vllm_attn_offload.memory_node.geometry_check import check_geometry
from vllm_attn_offload.memory_node.kv_cache import bytes_per_block
from vllm_attn_offload.memory_node.refusals import Refusals
from vllm_attn_offload.memory_node.session import Session
from vllm_attn_offload.memory_node.session_list import list_sessions
from vllm_attn_offload.protocol.messages import (
    GIB,
    AttachSession,
    CapacityReserved,
    OpenSession,
    ReserveCapacity,
    SessionOpened,
)
from vllm_attn_offload.protocol.session_stats import SessionStats

logger = logging.getLogger(__name__)

_MAX_RESERVATIONS = 256
_MAX_FRAME_BYTES = 1 << 30
#: A session ends after the slice that it computes.
_CLOSE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class _Reservation:
    request: ReserveCapacity
    engine_id: str
    num_blocks: int
    kv_bytes: int
    attach_token: str = ""
    session: Session | None = None


class Reservations:
    """Splits a node between engines; safe for concurrent callers.

    Args:
        attention: The kernel that attends.
        kv_bytes: Budget for KV blocks of all engines.
        refusals: Counts frames that the protocol does not allow.
    """

    def __init__(
        self,
        attention: DecodeAttention[Any, Any],
        kv_bytes: int,
        refusals: Refusals,
    ) -> None:
        self._refusals = refusals
        self.ledger = CapacityLedger(kv_bytes)
        self._attention = attention
        self._turns = FairLock()
        self._lock = threading.Lock()
        self._closed = threading.Condition(self._lock)
        self._num_closing = 0
        self._held: dict[str, _Reservation] = {}
        # Frames are received into memory of their own, which engines also compete for.
        self.frames = FrameBudget(max(_MAX_FRAME_BYTES, kv_bytes // 4))

    def reserve(self, request: ReserveCapacity, engine_id: str) -> CapacityReserved:
        """Hold memory for a worker.

        Args:
            request: Geometry of the worker's layers, and the bytes that it asks for.
            engine_id: Name of the engine's control connection.

        Raises:
            CapacityError: Less is free, or the node serves too many workers.
            ValueError: The geometry is wrong or no block fits.
        """
        block_bytes = self._block_bytes(request)
        num_blocks = request.kv_bytes // block_bytes
        reservation = secrets.token_hex(8)
        kv_bytes = num_blocks * block_bytes
        with self._lock:
            if len(self._held) >= _MAX_RESERVATIONS:
                raise CapacityError(
                    f"{len(self._held)} workers hold memory of this node; at most "
                    f"{_MAX_RESERVATIONS} may. Stop another engine of this node."
                )
            self._check_share(engine_id)
            self.ledger.reserve(reservation, kv_bytes)
            self._held[reservation] = _Reservation(
                request, engine_id, num_blocks, kv_bytes
            )
        logger.info(
            "reserved %.2f GiB (%d blocks) for engine %s rank %d; %.2f GiB stay free",
            kv_bytes / GIB,
            num_blocks,
            request.engine,
            request.shard.tp_rank,
            self.ledger.free_bytes / GIB,
        )
        return CapacityReserved(reservation, num_blocks, kv_bytes)

    def _block_bytes(self, request: ReserveCapacity) -> int:
        check_geometry(request.geometry)
        block_bytes = bytes_per_block(request.geometry, self._attention)
        if request.kv_bytes < block_bytes:
            raise ValueError(
                f"{request.kv_bytes:,} bytes of KV cache hold no block of "
                f"{block_bytes:,} bytes. Raise kv_cache_gib."
            )
        return block_bytes

    def open(self, request: OpenSession) -> SessionOpened:
        """Turn a reservation of the caller into a pool.

        Raises:
            CapacityError: The pool is larger than what is reserved, or the host has
                no memory for it.
            ValueError: It is open already, or its frames would be too long.
        """
        entry = self._held.get(request.reservation)
        if entry is None or entry.session:
            raise ValueError("this connection has no such unopened reservation")
        if request.num_blocks > entry.num_blocks:
            asked = request.num_blocks * entry.kv_bytes // entry.num_blocks
            raise CapacityError(
                f"a pool of {request.num_blocks:,} blocks needs {asked / GIB:.2f} GiB, "
                f"but {entry.kv_bytes / GIB:.2f} GiB are reserved. Raise kv_cache_gib "
                "or lower num_gpu_blocks_override."
            )
        sizes = FrameSizes(entry.request.geometry, request)
        _check_longest_frame(sizes)
        # A frame each way, a checked STEP, and its plans.
        num_bytes = sum(sizes.longest()) + sizes.plan_bytes
        self.frames.hold(request.reservation, entry.engine_id, num_bytes)
        try:
            entry.session = self._session(entry, request, sizes)
        except Exception:
            self.frames.release(request.reservation)
            raise
        entry.attach_token = secrets.token_hex(16)
        logger.info(
            "opened session %s: engine %s rank %d, %d layers, %d blocks of %s",
            request.reservation,
            entry.request.engine,
            entry.request.shard.tp_rank,
            len(entry.request.geometry.layers),
            request.num_blocks,
            entry.request.geometry.block_dtype,
        )
        return SessionOpened(request.reservation, entry.attach_token)

    def attach(self, request: AttachSession) -> Session:
        """The session that a worker may use from now on; its token is used up.

        Raises:
            ValueError: There is no such session, or the worker does not fit it.
        """
        with self._lock:
            entry = self._held.get(request.session)
            if entry is None or entry.session is None:
                raise ValueError(f"there is no open session {request.session!r}")
            _check_attach(entry.session, entry.attach_token, request)
            entry.attach_token = ""
            entry.session.worker_kv_bytes = request.worker_kv_bytes
            entry.session.worker_state_bytes = request.worker_state_bytes
            return entry.session

    def hold_slots(self, session: str, num_slots: int) -> bool:
        """Hold what shared memory takes beyond one frame each way, if there is room.

        A worker may touch every page of its slots, whatever it needs of them. Without
        room its frames come on the socket.
        """
        with self._lock:
            entry = self._held.get(session)
            if entry is None or entry.session is None:
                return False  # it was closed meanwhile, which its data channel notices
            num_bytes = (num_slots - 1) * sum(entry.session.sizes.longest())
            try:
                self.frames.hold(session, entry.engine_id, num_bytes)
            except CapacityError as error:
                logger.warning(
                    "engine %s gets no shared memory but frames on its socket, which "
                    "are slower: %s",
                    entry.request.engine,
                    error,
                )
                return False
        return True

    def release(self, reservation: str) -> None:
        """Free a reservation and its session; unknown names are ignored."""
        with self._lock:
            entry = self._held.pop(reservation, None)
            if entry is None:
                return
            self._num_closing += 1
        try:
            if entry.session is not None:
                entry.session.close()
        finally:
            with self._closed:
                self._num_closing -= 1
                self._closed.notify_all()
        self.ledger.release(reservation)
        self.frames.release(reservation)
        logger.info(
            "released engine %s rank %d; %.2f GiB are free",
            entry.request.engine,
            entry.request.shard.tp_rank,
            self.ledger.free_bytes / GIB,
        )

    def release_all(self) -> None:
        """Free everything, and wait for what other threads are freeing.

        A process that ends while one of its threads computes may crash.
        """
        with self._lock:
            names = list(self._held)
        for name in names:
            self.release(name)
        with self._closed:
            self._closed.wait_for(lambda: not self._num_closing, _CLOSE_TIMEOUT_S)

    def stats(self) -> list[SessionStats]:
        """Counters of the open sessions."""
        with self._lock:
            held = [(each.engine_id, each.session) for each in self._held.values()]
        return list_sessions([(name, each.stats()) for name, each in held if each])

    def _check_share(self, engine_id: str) -> None:
        engines = [entry.engine_id for entry in self._held.values()]
        most = int(ENGINE_SHARE * _MAX_RESERVATIONS)
        if engines.count(engine_id) >= most:
            raise CapacityError(
                f"this engine holds {most} reservations; at most {most} of "
                f"{_MAX_RESERVATIONS} may belong to one engine. Close some of them."
            )

    def _session(
        self, entry: _Reservation, request: OpenSession, sizes: FrameSizes
    ) -> Session:
        turns = self._turns.turns_of(entry.engine_id)
        try:
            return Session(
                entry.request, request, self._attention, turns, sizes, self._refusals
            )
        # torch reports a full GPU as a RuntimeError.
        except (OSError, MemoryError, RuntimeError) as error:
            raise CapacityError(
                f"{entry.kv_bytes / GIB:.2f} GiB are reserved, but the memory node's "
                f"host cannot allocate them now ({error}). Stop other processes there, "
                "or start the node with a smaller --kv-cache-gib."
            ) from error


def _check_longest_frame(sizes: FrameSizes) -> None:
    longest, _ = sizes.longest()
    if longest > _MAX_FRAME_BYTES:
        raise ValueError(
            f"frames of up to {longest / GIB:.2f} GiB were asked for; at most "
            f"{_MAX_FRAME_BYTES / GIB:.0f} GiB are allowed. Lower max_num_seqs, "
            "max_num_batched_tokens or max_model_len."
        )


def _check_attach(session: Session, token: str, request: AttachSession) -> None:
    if not hmac.compare_digest(token.encode(), request.attach_token.encode()):
        raise ValueError("the attach token is wrong or was used before")
    if session.generation != request.generation:
        raise ValueError(
            f"generation {request.generation} of the session is over; "
            f"{session.generation} is current"
        )
    if session.geometry.digest() != request.geometry_digest:
        raise ValueError(
            "the worker's attention layers differ from the session's (heads, head "
            "sizes, block size or dtype). Use the same model and vLLM version in all "
            "ranks of an engine."
        )
