# SPDX-License-Identifier: Apache-2.0
"""One worker's session on a memory node: its KV pool and the loop that serves it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.memory_node.decode_attention.base import (
    DecodeAttention,
    SharedRowsAttention,
)
from vllm_attn_offload.memory_node.fair_lock import FairLock
from vllm_attn_offload.memory_node.kv_cache import PagedKVCache
from vllm_attn_offload.protocol.frames import FrameFlag, FrameHeader, FrameKind
from vllm_attn_offload.protocol.layer import DTYPE_BYTES, PayloadLayout, TokenLayout
from vllm_attn_offload.protocol.messages import (
    OpenSession,
    ReserveCapacity,
    SessionStats,
)
from vllm_attn_offload.protocol.step import StepLimits, read_step
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.device_memory import DeviceMemoryTransport
from vllm_attn_offload.transport.shared_device import DeviceRows

logger = logging.getLogger(__name__)

MAX_MICRO_BATCHES = 8

# Once per layer: an IntFlag makes an object of every result, which takes longer.
_WANT_LSE = FrameFlag.WANT_LSE.value
_FUSED = FrameFlag.FUSED.value
_WANT_ACK = FrameFlag.WANT_ACK.value
_ON_DEVICE = FrameFlag.ON_DEVICE.value
_MAX_ERROR_BYTES = 1 << 16
#: Of device memory: decode steps of large batches fit, prefills need not.
_MAX_ROWS_BYTES = 16 << 20


@dataclass(slots=True)
class _Counters:
    num_steps: int = 0
    num_layer_calls: int = 0
    num_attended_tokens: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    receive_s: float = 0.0
    queue_s: float = 0.0
    store_s: float = 0.0
    attend_s: float = 0.0
    send_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _PlannedStep:
    """A step that layers refer to; ``layouts`` are kept, because layers are alike."""

    step: int
    num_tokens: int
    num_query_rows: int
    num_attended_tokens: int
    plan: object
    layouts: dict[tuple[int, bool], PayloadLayout]


class Session:
    """The KV pool of one worker, and its attention.

    Args:
        reserved: What the engine reserved: geometry and shard.
        opened: Pool size and the largest step.
        attention: The node's kernel.
        turns: Of sessions to compute; one LAYER at a time on a node.
    """

    def __init__(
        self,
        reserved: ReserveCapacity,
        opened: OpenSession,
        attention: DecodeAttention,
        turns: FairLock,
    ) -> None:
        self.geometry = reserved.geometry
        self.generation = opened.generation
        self.worker_kv_bytes = 0
        self._engine = reserved.engine
        self._shard = reserved.shard
        self._attention = attention
        self._turns = turns
        self._cache = PagedKVCache(self.geometry, opened.num_blocks, attention)
        self._pools = [
            attention.bind(self.geometry, layer, self._cache.region(layer))
            for layer in self.geometry.layers
        ]
        self._rows = [TokenLayout.of(layer) for layer in self.geometry.layers]
        self._kinds = [self._rows.index(rows) for rows in self._rows]
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
        self._step = memoryview(bytearray(0))
        self._transport: Transport | None = None

    def frame_bytes(self) -> tuple[int, int]:
        """Bytes of the longest payload of a request and of a reply."""
        max_tokens = self._limits[0].max_num_tokens
        steps = max(limits.max_step_bytes for limits in self._limits)
        rows = max(rows.width for rows in self._rows) * self._item_bytes
        heads = max(layer.num_query_heads for layer in self.geometry.layers)
        out = max(rows.out for rows in self._rows) * self._item_bytes + 4 * heads
        return max(steps, max_tokens * rows), max(_MAX_ERROR_BYTES, max_tokens * out)

    def device_rows(self) -> DeviceRows | None:
        """What the node's device shares with the worker for rows of decode steps."""
        if not isinstance(self._attention, SharedRowsAttention):
            return None
        num_rows, item_bytes = self._limits[0].max_num_reqs, self._item_bytes
        request_bytes, reply_bytes = (
            min(num_rows * width * item_bytes, _MAX_ROWS_BYTES)
            for width in (
                max(rows.width for rows in self._rows),
                max(rows.out for rows in self._rows),
            )
        )
        return DeviceRows(self._attention.shared_device, request_bytes, reply_bytes)

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
            num_attended_tokens=counters.num_attended_tokens,
            bytes_received=counters.bytes_received,
            bytes_sent=counters.bytes_sent,
            receive_s=counters.receive_s,
            queue_s=counters.queue_s,
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
            with self._turns:
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
        with self._turns:
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
        # Copied first: where memory is shared, a worker could change what was checked.
        if self._step.nbytes < header.num_bytes:
            self._step = memoryview(bytearray(header.num_bytes))
        payload = self._step[: header.num_bytes]
        transport.receive_payload_into(payload)
        step = read_step(payload, limits)
        plan = self._attention.plan(header.group, self.geometry, step)
        key = (header.micro_batch, header.group)
        has_queries = np.diff(step.query_start_loc) > 0
        self._steps[key] = _PlannedStep(
            header.step,
            step.num_tokens,
            step.num_query_rows,
            int(step.seq_lens[has_queries].sum()),
            plan,
            {},
        )
        self._counters.num_steps += 1
        self._counters.bytes_received += header.num_bytes

    def _serve_layer(
        self, transport: Transport, header: FrameHeader, started: float
    ) -> None:
        planned = self._planned_step(header)
        layout = self._layout(planned, header)
        if header.num_bytes != layout.num_bytes:
            raise ProtocolError(
                f"layer {header.layer} with {header.num_bytes:,} bytes; "
                f"{planned.num_query_rows:,} query rows and {planned.num_tokens:,} "
                f"tokens need {layout.num_bytes:,}"
            )
        if header.flags & _ON_DEVICE:
            self._serve_rows(transport, header, planned, layout)
            return
        payload = transport.receive_payload(header.num_bytes)
        received = time.perf_counter()
        out, lse, reply = self._reply(transport, planned, header)
        self._compute(header.layer, planned.plan, payload, layout, out, lse)
        attended = time.perf_counter()
        if planned.num_query_rows or header.flags & _WANT_ACK:
            header.kind, header.num_bytes = FrameKind.OUT, reply.nbytes
            transport.send(header, reply)
        counters = self._counters
        counters.num_attended_tokens += planned.num_attended_tokens
        counters.num_layer_calls += 1
        counters.bytes_received += layout.num_bytes
        counters.bytes_sent += reply.nbytes
        counters.receive_s += received - started
        counters.send_s += time.perf_counter() - attended

    def _serve_rows(
        self,
        transport: Transport,
        header: FrameHeader,
        planned: _PlannedStep,
        layout: PayloadLayout,
    ) -> None:
        """As `_serve_layer`, with rows and output in device memory."""
        attention, num_rows = self._attention, planned.num_query_rows
        if (
            not isinstance(transport, DeviceMemoryTransport)
            or not isinstance(attention, SharedRowsAttention)
            or not num_rows
            or header.flags & _WANT_LSE
        ):
            raise ProtocolError("rows in device memory that this channel does not take")
        rows = transport.receive_rows(header.num_bytes)
        num_bytes = num_rows * self._rows[header.layer].out * self._item_bytes
        if not transport.fits(num_bytes):
            raise ProtocolError(f"{num_bytes:,} bytes of output in device memory")
        out = transport.rows_buffer(num_bytes)
        asked = time.perf_counter()
        with self._turns:
            self._raise_if_closed()
            started = time.perf_counter()
            attention.attend_rows(
                self._pools[header.layer], planned.plan, rows, layout, out
            )
        attention.finish_rows(planned.plan)
        attended = time.perf_counter()
        header.kind, header.num_bytes = FrameKind.OUT, num_bytes
        transport.send(header)
        counters = self._counters
        counters.num_attended_tokens += planned.num_attended_tokens
        counters.num_layer_calls += 1
        counters.bytes_received += layout.num_bytes
        counters.bytes_sent += num_bytes
        counters.queue_s += started - asked
        counters.attend_s += attended - started
        counters.send_s += time.perf_counter() - attended

    def _layout(self, planned: _PlannedStep, header: FrameHeader) -> PayloadLayout:
        rows = self._rows[header.layer]
        is_fused = bool(header.flags & _FUSED)
        key = (self._kinds[header.layer], is_fused)
        layout = planned.layouts.get(key)
        if layout is None:
            if is_fused and planned.num_query_rows != planned.num_tokens:
                raise ProtocolError(
                    f"fused rows for {planned.num_query_rows:,} query rows and "
                    f"{planned.num_tokens:,} tokens"
                )
            layout = (
                PayloadLayout.fused(rows, planned.num_tokens, self._item_bytes)
                if is_fused
                else PayloadLayout.planar(
                    rows, planned.num_query_rows, planned.num_tokens, self._item_bytes
                )
            )
            planned.layouts[key] = layout
        return layout

    def _reply(
        self, transport: Transport, planned: _PlannedStep, header: FrameHeader
    ) -> tuple[memoryview, memoryview | None, memoryview]:
        """Output, log-sum-exp where it is wanted, and both as one payload."""
        out_bytes = (
            planned.num_query_rows * self._rows[header.layer].out * self._item_bytes
        )
        lse_bytes = 0
        if header.flags & _WANT_LSE:
            num_heads = self.geometry.layers[header.layer].num_query_heads
            lse_bytes = planned.num_query_rows * num_heads * 4
        reply = transport.payload_buffer(out_bytes + lse_bytes)
        if not lse_bytes:
            return reply, None, reply
        return reply[:out_bytes], reply[out_bytes:], reply

    def _compute(
        self,
        layer: int,
        plan: object,
        payload: memoryview,
        layout: PayloadLayout,
        out: memoryview,
        lse: memoryview | None,
    ) -> None:
        """Store and attend, in turn with other sessions.

        No reference to a pool outlives the lock: ``close`` unmaps it next.
        """
        asked = time.perf_counter()
        with self._turns:
            self._raise_if_closed()
            started = time.perf_counter()
            attention, pool = self._attention, self._pools[layer]
            if layout.num_tokens:
                attention.store(pool, plan, payload, layout)
            stored = time.perf_counter()
            if layout.num_query_rows:
                attention.attend(pool, plan, payload, layout, out, lse)
        if layout.num_query_rows:
            attention.finish(plan, out, lse)
        self._counters.queue_s += started - asked
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


def _send_error(transport: Transport, message: str) -> None:
    payload = memoryview(message.encode())
    header = FrameHeader(kind=FrameKind.ERROR, num_bytes=payload.nbytes)
    try:
        transport.send(header, payload)
    except OSError as error:
        logger.debug("the refusal was not delivered: %s", error)
