# SPDX-License-Identifier: Apache-2.0
"""Serves a session's layers without the interpreter, as long as nothing is unusual."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_attn_offload.memory_node.decode_attention.base import LoopAttention
from vllm_attn_offload.memory_node.fair_lock import Turns
from vllm_attn_offload.memory_node.frame_sizes import MAX_MICRO_BATCHES
from vllm_attn_offload.memory_node.planned_step import PlannedStep
from vllm_attn_offload.native.layer_loop import (
    PASS_ON,
    REFUSED,
    UNFINISHED,
    LayerServer,
    ServedLayer,
    ServedStep,
    load_layer_loop,
)
from vllm_attn_offload.native.waits import READY
from vllm_attn_offload.protocol.frames import FrameHeader
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.layer import DTYPE_BYTES, TokenLayout
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.transport.shared_memory import SharedMemoryTransport

_SECOND = 1e-9


class LayerLoop:
    """Receives frames of a channel in shared memory and serves the layers among them.

    A layer that names no planned step, has another size than the step asks for, takes
    more than a slice, fails, or comes while others compute, is the caller's, like every
    other frame.

    Args:
        attention: The node's kernel.
        geometry: Layers of the session.
        pools: Their blocks.
        turns: Turns of the session's engine.
        slice_s: Longest turn, about.
    """

    def __init__(
        self,
        attention: LoopAttention[Any, Any],
        geometry: SessionGeometry,
        pools: Sequence[Any],
        turns: Turns,
        slice_s: float,
    ) -> None:
        self._attention, self._turns = attention, turns
        self._num_groups = len(geometry.groups)
        self._layers = (ServedLayer * len(pools))(*map(attention.served_layer, pools))
        item_bytes = DTYPE_BYTES[geometry.dtype]
        for served, layer in zip(self._layers, geometry.layers, strict=True):
            rows = TokenLayout.of(layer)
            served.group, served.stores = layer.group, layer.stores
            served.q_bytes, served.k_bytes, served.v_bytes, served.out_bytes = (
                elements * item_bytes for elements in (rows.q, rows.k, rows.v, rows.out)
            )
            served.lse_bytes = 4 * layer.num_query_heads
        self._steps = (ServedStep * (MAX_MICRO_BATCHES * self._num_groups))()
        self._server = LayerServer(
            turn=turns.address,
            layers=ctypes.addressof(self._layers),
            steps=ctypes.addressof(self._steps),
            num_layers=len(pools),
            num_groups=self._num_groups,
            num_micro_batches=MAX_MICRO_BATCHES,
            is_open=1,
            max_payload_bytes=attention.store_bytes,
            slice_ns=int(slice_s / _SECOND),
        )
        self._serve = load_layer_loop()
        self._ref = ctypes.byref(self._server)

    def forget(self, micro_batch: int, group: int) -> None:
        """Serve no layer of a step any more: its plan may change."""
        self._steps[micro_batch * self._num_groups + group].plans = None

    def add_step(self, micro_batch: int, group: int, planned: PlannedStep) -> None:
        """Serve the layers of a step, whose plan lives until `forget`."""
        step = self._steps[micro_batch * self._num_groups + group]
        step.number, step.num_tokens = planned.number, planned.num_tokens
        step.num_query_rows = planned.num_query_rows
        step.num_attended_tokens = planned.num_attended_tokens
        served = self._attention.served_plan(planned.plan)
        step.plans, step.slots, step.pool = served

    def receive(self, transport: SharedMemoryTransport, header: FrameHeader) -> bool:
        """Serve layers until a frame comes that is the caller's.

        Args:
            transport: The session's channel.
            header: Overwritten with that of the frame, which is the transport's current
                one.

        Returns:
            True for a layer whose rows are stored and of which a slice is attended.

        Raises:
            ConnectionError: The peer closed the channel.
            ProtocolError: What came is not a frame.
        """
        self._server.channel = transport.channel_address
        while (status := transport.call(self._serve, self._ref)) == PASS_ON:
            self._turns.leave()
        is_begun = status == UNFINISHED
        if is_begun or status == REFUSED:
            self._turns.leave()
            status = READY
        transport.read_header(header, status, None)
        return is_begun

    def close(self) -> None:
        """Serve nothing any more; called in a turn."""
        self._server.is_open = 0

    def counters(self, others: SessionCounters) -> SessionCounters:
        """Counters of a session: of layers that were served here, and others."""
        own = self._server.counters
        return msgspec.structs.replace(
            others,
            num_layer_calls=others.num_layer_calls + own.num_layer_calls,
            num_attended_tokens=others.num_attended_tokens + own.num_attended_tokens,
            bytes_received=others.bytes_received + own.bytes_received,
            bytes_sent=others.bytes_sent + own.bytes_sent,
            store_s=others.store_s + own.store_ns * _SECOND,
            attend_s=others.attend_s + own.attend_ns * _SECOND,
            send_s=others.send_s + own.send_ns * _SECOND,
            layer_s=others.layer_s + own.layer_ns * _SECOND,
        )
