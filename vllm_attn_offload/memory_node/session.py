# SPDX-License-Identifier: Apache-2.0
"""One worker's session on a memory node: its KV pool and the loop that serves it."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.memory_node.decode_attention.base import (
    DecodeAttention,
    LayerCall,
    SharedRowsAttention,
)
from vllm_attn_offload.memory_node.frame_error import send_error
from vllm_attn_offload.memory_node.frame_sizes import FrameSizes
from vllm_attn_offload.memory_node.planned_step import PlannedStep
from vllm_attn_offload.memory_node.refusals import NO_KIND, Refusals
from vllm_attn_offload.memory_node.session_pool import SessionPool
from vllm_attn_offload.memory_node.session_steps import SessionSteps
from vllm_attn_offload.memory_node.thread_clock import ThreadClock
from vllm_attn_offload.protocol.frames import FrameFlag, FrameHeader, FrameKind
from vllm_attn_offload.protocol.layer import PayloadLayout
from vllm_attn_offload.protocol.messages import (
    OpenSession,
    ReserveCapacity,
)
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.session_stats import SessionStats
from vllm_attn_offload.protocol.step_reader import read_worker_times
from vllm_attn_offload.protocol.value_types import TRANSPORT_NAMES
from vllm_attn_offload.transport.base import Transport
from vllm_attn_offload.transport.cuda_memory import DeviceRows
from vllm_attn_offload.transport.device_memory import DeviceMemoryTransport
from vllm_attn_offload.transport.shared_memory import SharedMemoryTransport

logger = logging.getLogger(__name__)


# Once per layer: an IntFlag makes an object of every result, which takes longer.
_WANT_LSE = FrameFlag.WANT_LSE.value
_WANT_ACK = FrameFlag.WANT_ACK.value
_ON_DEVICE = FrameFlag.ON_DEVICE.value


class Session:
    """The KV pool of one worker, and its attention.

    Args:
        reserved: What the engine reserved: geometry and shard.
        opened: Pool size and the largest step.
        attention: The node's kernel.
        turns: Context in which nobody else computes.
        sizes: Sizes of the session's frames.
        refusals: Counts frames that the protocol does not allow.
    """

    def __init__(
        self,
        reserved: ReserveCapacity,
        opened: OpenSession,
        attention: DecodeAttention[Any, Any],
        turns: AbstractContextManager[None],
        sizes: FrameSizes,
        refusals: Refusals,
    ) -> None:
        self.geometry = reserved.geometry
        self.generation = opened.generation
        self.worker_kv_bytes = 0
        self.worker_state_bytes = 0
        self.worker_cpu_ids: list[int] = []
        self._reserved = reserved
        self._engine = reserved.engine
        self._refusals = refusals
        self._attention = attention
        self.sizes = sizes
        self._counters = SessionCounters()
        self._pool = SessionPool(
            self.geometry, opened.num_blocks, attention, turns, self._counters
        )
        self._steps = SessionSteps(self.geometry, sizes, attention, self._pool.loop)
        self._step = memoryview(bytearray(0))
        self._transport: Transport | None = None
        self._clock = ThreadClock()

    def device_rows(self) -> DeviceRows | None:
        """Device memory shared with the worker for rows of decode steps."""
        if not isinstance(self._attention, SharedRowsAttention):
            return None
        return self.sizes.device_rows(self._attention.shared_device)

    def stats(self) -> SessionStats:
        """Memory of the session, and its counters since it was opened."""
        return SessionStats(
            engine=self._engine,
            tp_rank=self._reserved.shard.tp_rank,
            num_blocks=self._pool.num_blocks,
            kv_bytes=self._pool.num_bytes,
            worker_kv_bytes=self.worker_kv_bytes,
            worker_state_bytes=self.worker_state_bytes,
            worker_cpu_ids=self.worker_cpu_ids,
            counters=self._all_counters(),
            model=self._reserved.model,
            engine_index=self._reserved.engine_index,
            transport=TRANSPORT_NAMES[self._transport.name if self._transport else ""],
            generation=self.generation,
        )

    def serve(self, transport: Transport) -> None:
        """Serve frames until the worker closes its data channel.

        A frame that the protocol does not allow is answered with an ERROR frame, and
        the channel is closed; other sessions do not notice.
        """
        header, kind = FrameHeader(), NO_KIND
        self._clock.start()
        try:
            self._pool.while_open(lambda: self._use(transport))
            while True:
                kind = NO_KIND
                is_begun = self._receive(transport, header)
                kind = header.kind
                self._serve_frame(transport, header, is_begun)
        except ProtocolError as error:
            self._refusals.count_frame(kind)
            logger.warning("session of %s refused: %s", self._engine, error)
            send_error(transport, str(error))
        except OSError as error:
            logger.info("data channel of %s ended: %s", self._engine, error)
        except (MemoryError, RuntimeError, ValueError) as error:
            # What a kernel or an allocation raises; other sessions go on.
            problem = f"{type(error).__name__}: {error}".rstrip(": ")
            logger.error("session of %s failed: %s", self._engine, problem)
            send_error(
                transport,
                f"the memory node could not compute ({problem}). Give it more memory, "
                "or lower max_num_batched_tokens or max_num_seqs.",
                FrameFlag.FAILED,
            )
        finally:
            self._clock.stop()

    def close(self) -> None:
        """End the data channel and free the KV pool."""
        self._pool.close(self._steps.close)
        # Whoever attaches from now on finds the pool closed.
        if self._transport is not None:
            self._transport.close()

    def _use(self, transport: Transport) -> None:
        self._transport = transport

    def _all_counters(self) -> SessionCounters:
        counters = msgspec.structs.replace(self._counters, cpu_s=self._clock.cpu_s)
        loop = self._pool.loop
        return counters if loop is None else loop.counters(counters)

    def _receive(self, transport: Transport, header: FrameHeader) -> bool:
        """Wait for a frame; True for a LAYER that is stored and attended in part."""
        loop = self._pool.loop
        if loop is None or not isinstance(transport, SharedMemoryTransport):
            transport.receive_header(header, None)
            return False
        return loop.receive(transport, header)

    def _serve_frame(
        self, transport: Transport, header: FrameHeader, is_begun: bool
    ) -> None:
        started = time.perf_counter()
        if header.kind == FrameKind.STEP:
            self._serve_step(transport, header)
            self._counters.plan_s += time.perf_counter() - started
        elif header.kind == FrameKind.LAYER:
            self._serve_layer(transport, header, started, is_begun)
            self._counters.layer_s += time.perf_counter() - started
        else:
            raise ProtocolError(
                f"a frame of kind {header.kind}, which nodes don't take"
            )

    def _serve_step(self, transport: Transport, header: FrameHeader) -> None:
        self._steps.check_size(header)
        # Copied first: where memory is shared, a worker could change what was checked.
        if self._step.nbytes < header.num_bytes:
            self._step = memoryview(bytearray(header.num_bytes))
        payload = self._step[: header.num_bytes]
        transport.receive_payload_into(payload)
        is_neighbour = isinstance(transport, SharedMemoryTransport)
        self._steps.plan(header, payload, is_neighbour=is_neighbour)
        counters = self._counters
        counters.worker_pack_s, counters.worker_send_s, counters.worker_wait_s = (
            read_worker_times(payload)
        )
        counters.num_steps += 1
        counters.bytes_received += header.num_bytes

    def _serve_layer(
        self,
        transport: Transport,
        header: FrameHeader,
        started: float,
        is_begun: bool,
    ) -> None:
        planned, layout = self._steps.of_layer(header)
        if header.flags & _ON_DEVICE:
            self._serve_rows(transport, header, planned, layout)
            return
        payload = transport.receive_payload(header.num_bytes)
        received = time.perf_counter()
        num_rows, lse_bytes = planned.num_query_rows, 0
        out_bytes = num_rows * self.sizes.out_row_bytes[header.layer]
        if header.flags & _WANT_LSE:
            lse_bytes = num_rows * self.sizes.lse_row_bytes[header.layer]
        reply = transport.payload_buffer(out_bytes + lse_bytes)
        call = (
            LayerCall(payload, layout, reply[:out_bytes], reply[out_bytes:])
            if lse_bytes
            else LayerCall(payload, layout, reply, None)
        )
        self._pool.compute(
            header.layer,
            planned.plan,
            call,
            transport.has_ended,
            is_begun=is_begun,
        )
        attended = time.perf_counter()
        if num_rows or header.flags & _WANT_ACK:
            header.kind, header.num_bytes = FrameKind.OUT, reply.nbytes
            transport.send(header, reply)
        self._counters.add(
            planned.num_attended_tokens,
            layout.num_bytes,
            reply.nbytes,
            received - started,
            time.perf_counter() - attended,
        )

    def _serve_rows(
        self,
        transport: Transport,
        header: FrameHeader,
        planned: PlannedStep,
        layout: PayloadLayout,
    ) -> None:
        """Serve a layer whose rows and output lie in device memory."""
        attention = self._attention
        if (
            not isinstance(transport, DeviceMemoryTransport)
            or not isinstance(attention, SharedRowsAttention)
            or not planned.num_query_rows
            or header.flags & _WANT_LSE
        ):
            raise ProtocolError("rows in device memory that this channel does not take")
        rows = transport.receive_rows(header.num_bytes)
        num_bytes = planned.num_query_rows * self.sizes.out_row_bytes[header.layer]
        if not transport.fits(num_bytes):
            raise ProtocolError(f"{num_bytes:,} bytes of output in device memory")
        out = transport.rows_buffer(num_bytes)
        self._pool.compute_rows(
            attention,
            header.layer,
            planned.plan,
            rows,
            layout,
            out,
            transport.has_ended,
        )
        attended = time.perf_counter()
        header.kind, header.num_bytes = FrameKind.OUT, num_bytes
        transport.send(header)
        send_s = time.perf_counter() - attended
        self._counters.add(
            planned.num_attended_tokens, layout.num_bytes, num_bytes, 0.0, send_s
        )
