# SPDX-License-Identifier: Apache-2.0
"""One worker's session on a memory node: its KV pool and the loop that serves it."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.memory_node.decode_attention.base import (
    DTYPE_BYTES,
    DecodeAttention,
    RowLayout,
)
from vllm_attn_offload.memory_node.kv_cache import PagedKVCache
from vllm_attn_offload.memory_node.step import StepLimits, read_step
from vllm_attn_offload.protocol import (
    FrameFlag,
    FrameHeader,
    FrameKind,
    OpenSession,
    ReserveCapacity,
    SessionStats,
)
from vllm_attn_offload.transport.base import Transport

logger = logging.getLogger(__name__)

MAX_MICRO_BATCHES = 8


@dataclass(slots=True)
class _Counters:
    num_steps: int = 0
    num_layer_calls: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    receive_s: float = 0.0
    store_s: float = 0.0
    attend_s: float = 0.0
    send_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _PlannedStep:
    step: int
    num_tokens: int
    plan: object


class Session:
    """The KV pool of one worker, and its attention.

    Args:
        reserved: What the engine reserved: geometry and shard.
        opened: Pool size and the largest step.
        attention: The node's kernel.
        compute_lock: Held while the kernel runs; one LAYER at a time on a node.
    """

    def __init__(
        self,
        reserved: ReserveCapacity,
        opened: OpenSession,
        attention: DecodeAttention,
        compute_lock: threading.Lock,
    ) -> None:
        self.geometry = reserved.geometry
        self.generation = opened.generation
        self.worker_kv_bytes = 0
        self._engine = reserved.engine
        self._shard = reserved.shard
        self._attention = attention
        self._compute_lock = compute_lock
        self._cache = PagedKVCache(self.geometry, opened.num_blocks, attention)
        self._pools = [
            attention.bind(self.geometry, layer, self._cache.region(layer))
            for layer in self.geometry.layers
        ]
        self._rows = [RowLayout.of(layer) for layer in self.geometry.layers]
        self._item_bytes = DTYPE_BYTES[self.geometry.dtype]
        self._limits = [
            StepLimits(
                num_blocks=opened.num_blocks,
                block_size=group.block_size,
                max_num_tokens=opened.max_num_tokens,
                max_num_reqs=opened.max_num_reqs,
                max_blocks_per_req=opened.max_blocks_per_req,
            )
            for group in self.geometry.groups
        ]
        self._steps: dict[tuple[int, int], _PlannedStep] = {}
        self._counters = _Counters()
        self._out = memoryview(bytearray(0))
        self._transport: Transport | None = None

    def stats(self) -> SessionStats:
        """Counters since the session was opened."""
        counters = self._counters
        return SessionStats(
            engine=self._engine,
            tp_rank=self._shard.tp_rank,
            num_blocks=self._cache.num_blocks,
            kv_bytes=self._cache.num_bytes,
            worker_kv_bytes=self.worker_kv_bytes,
            num_steps=counters.num_steps,
            num_layer_calls=counters.num_layer_calls,
            bytes_received=counters.bytes_received,
            bytes_sent=counters.bytes_sent,
            receive_s=counters.receive_s,
            store_s=counters.store_s,
            attend_s=counters.attend_s,
            send_s=counters.send_s,
        )

    def serve(self, transport: Transport) -> None:
        """Serve frames until the worker closes its data channel.

        A frame that the protocol does not allow is answered with an ERROR frame, and
        the channel is closed; other sessions do not notice.
        """
        header = FrameHeader()
        try:
            with self._compute_lock:
                self._raise_if_closed()
                self._transport = transport
            while True:
                transport.receive_header(header, None)
                self._serve_frame(transport, header)
        except ProtocolError as error:
            logger.warning("session of %s refused: %s", self._engine, error)
            _send_error(transport, str(error))
        except OSError as error:
            logger.info("data channel of %s ended: %s", self._engine, error)

    def close(self) -> None:
        """End the data channel and free the KV pool."""
        with self._compute_lock:
            self._pools.clear()
            self._steps.clear()
            self._cache.close()
            transport = self._transport
        if transport is not None:
            transport.close()

    def _raise_if_closed(self) -> None:
        if not self._pools:
            raise ConnectionResetError("the session was closed")

    def _serve_frame(self, transport: Transport, header: FrameHeader) -> None:
        started = time.perf_counter()
        if header.kind == FrameKind.STEP:
            self._serve_step(transport, header)
        elif header.kind == FrameKind.LAYER:
            self._serve_layer(transport, header, started)
        else:
            raise ProtocolError(
                f"a frame of kind {header.kind}, which nodes don't take"
            )

    def _serve_step(self, transport: Transport, header: FrameHeader) -> None:
        if header.group >= len(self._limits):
            raise ProtocolError(f"a STEP for KV group {header.group}")
        if header.micro_batch >= MAX_MICRO_BATCHES:
            raise ProtocolError(f"a STEP for micro-batch {header.micro_batch}")
        limits = self._limits[header.group]
        if header.num_bytes > limits.max_step_bytes:
            raise ProtocolError(
                f"a STEP of {header.num_bytes:,} bytes; at most "
                f"{limits.max_step_bytes:,} fit this session"
            )
        payload = transport.receive_payload(header.num_bytes)
        step = read_step(payload, limits)
        plan = self._attention.plan(header.group, self.geometry, step)
        key = (header.micro_batch, header.group)
        self._steps[key] = _PlannedStep(header.step, step.num_tokens, plan)
        self._counters.num_steps += 1
        self._counters.bytes_received += header.num_bytes

    def _serve_layer(
        self, transport: Transport, header: FrameHeader, started: float
    ) -> None:
        planned = self._planned_step(header)
        rows = self._rows[header.layer]
        expected = planned.num_tokens * rows.width * self._item_bytes
        if header.num_bytes != expected:
            raise ProtocolError(
                f"layer {header.layer} with {header.num_bytes:,} bytes; "
                f"{planned.num_tokens:,} tokens need {expected:,}"
            )
        qkv = transport.receive_payload(header.num_bytes)
        received = time.perf_counter()
        out_bytes = planned.num_tokens * rows.out * self._item_bytes
        lse_bytes = 0
        if header.flags & FrameFlag.WANT_LSE:
            num_heads = self.geometry.layers[header.layer].num_query_heads
            lse_bytes = planned.num_tokens * num_heads * 4
        reply = self._reply_buffer(out_bytes + lse_bytes)
        out, lse = reply[:out_bytes], reply[out_bytes:] if lse_bytes else None
        self._compute(header.layer, planned.plan, qkv, out, lse)
        attended = time.perf_counter()
        header.kind, header.num_bytes = FrameKind.OUT, reply.nbytes
        transport.send(header, reply)
        counters = self._counters
        counters.num_layer_calls += 1
        counters.bytes_received += expected
        counters.bytes_sent += reply.nbytes
        counters.receive_s += received - started
        counters.send_s += time.perf_counter() - attended

    def _compute(
        self,
        layer: int,
        plan: object,
        qkv: memoryview,
        out: memoryview,
        lse: memoryview | None,
    ) -> None:
        """Store and attend, in turn with other sessions.

        No reference to a pool outlives the lock: ``close`` unmaps it next.
        """
        with self._compute_lock:
            self._raise_if_closed()
            started = time.perf_counter()
            self._attention.store(self._pools[layer], plan, qkv)
            stored = time.perf_counter()
            self._attention.attend(self._pools[layer], plan, qkv, out, lse)
        self._attention.finish(plan, out, lse)
        self._counters.store_s += stored - started
        self._counters.attend_s += time.perf_counter() - stored

    def _planned_step(self, header: FrameHeader) -> _PlannedStep:
        if header.layer >= len(self.geometry.layers):
            raise ProtocolError(
                f"layer {header.layer}; this session has {len(self.geometry.layers)}"
            )
        group = self.geometry.layers[header.layer].group
        planned = self._steps.get((header.micro_batch, group))
        if planned is None or planned.step != header.step:
            raise ProtocolError(
                f"layer {header.layer} of step {header.step} before its STEP frame"
            )
        return planned

    def _reply_buffer(self, num_bytes: int) -> memoryview:
        if self._out.nbytes < num_bytes:
            self._out = memoryview(bytearray(num_bytes))
        return self._out[:num_bytes]


def _send_error(transport: Transport, message: str) -> None:
    payload = memoryview(message.encode())
    header = FrameHeader(kind=FrameKind.ERROR, num_bytes=payload.nbytes)
    try:
        transport.send(header, payload)
    except OSError as error:
        logger.debug("the refusal was not delivered: %s", error)
