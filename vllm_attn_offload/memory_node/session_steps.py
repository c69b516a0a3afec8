# SPDX-License-Identifier: Apache-2.0
"""Steps of one session that its layers may belong to."""

from __future__ import annotations

from typing import Any

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.memory_node.frame_sizes import MAX_MICRO_BATCHES, FrameSizes
from vllm_attn_offload.memory_node.layer_loop import LayerLoop
from vllm_attn_offload.memory_node.planned_step import PlannedStep
from vllm_attn_offload.protocol.frames import FrameFlag, FrameHeader
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.layer import PayloadLayout
from vllm_attn_offload.protocol.step_reader import read_step

# Once per layer: an IntFlag makes an object of every result, which takes longer.
_FUSED = FrameFlag.FUSED.value
_ON_HALF = FrameFlag.ON_HALF.value


class SessionSteps:
    """Reads and plans STEPs, and finds that of a LAYER.

    Args:
        geometry: Layers of the session.
        sizes: Sizes of its frames.
        attention: The node's kernel.
        loop: Serves layers of planned steps, too; None: nothing else does.
    """

    def __init__(
        self,
        geometry: SessionGeometry,
        sizes: FrameSizes,
        attention: DecodeAttention[Any, Any],
        loop: LayerLoop | None,
    ) -> None:
        self._geometry = geometry
        self._sizes = sizes
        self._attention = attention
        self._loop = loop
        self._planned: dict[tuple[int, int], PlannedStep] = {}
        self._is_closed = False

    def close(self) -> None:
        """Forget all steps, for good; called in a turn in which the loop ends."""
        self._is_closed = True
        self._planned.clear()

    def check_size(self, header: FrameHeader) -> None:
        """Check the header of a STEP.

        Raises:
            ProtocolError: No such group, micro-batch or flag, or too many bytes.
        """
        if header.group >= len(self._sizes.limits):
            raise ProtocolError(f"a STEP for KV group {header.group}")
        if header.micro_batch >= MAX_MICRO_BATCHES:
            raise ProtocolError(f"a STEP for micro-batch {header.micro_batch}")
        if header.flags & ~_ON_HALF:
            raise ProtocolError(f"a STEP with flags {header.flags:#x}")
        limits = self._sizes.limits[header.group]
        if header.num_bytes > limits.max_step_bytes:
            raise ProtocolError(
                f"a STEP of {header.num_bytes:,} bytes; at most "
                f"{limits.max_step_bytes:,} fit this session"
            )

    def plan(
        self, header: FrameHeader, payload: memoryview, *, is_neighbour: bool
    ) -> None:
        """Read a STEP, whose bytes nobody else can change, and plan it.

        Args:
            header: The STEP's.
            payload: Its bytes.
            is_neighbour: The worker is on this host, so that it may have the node's
                CPUs.

        Raises:
            ProtocolError: It is not what the protocol allows.
        """
        limits = self._sizes.limits[header.group]
        step = read_step(payload, limits)
        key = (header.micro_batch, header.group)
        # Its layers are done: the kernel may use its plan's memory again.
        previous = self._planned.pop(key, None)
        if self._loop is not None:
            self._loop.forget(*key)
        plan = self._attention.plan(
            *(header.group, self._geometry, step, previous and previous.plan),
            on_half=is_neighbour and bool(header.flags & _ON_HALF),
        )
        planned = PlannedStep.of(header.step, step, plan, limits.block_size)
        self._planned[key] = planned
        if self._loop is not None:
            self._loop.add_step(*key, planned)

    def of_layer(self, header: FrameHeader) -> tuple[PlannedStep, PayloadLayout]:
        """The step and the payload of a LAYER, whose header is checked.

        Raises:
            ConnectionResetError: The session was closed.
            ProtocolError: It names no layer of a planned step, or has another size.
        """
        if self._is_closed:
            raise ConnectionResetError("the session was closed")
        layers = self._geometry.layers
        if header.layer >= len(layers):
            raise ProtocolError(f"layer {header.layer}; this session has {len(layers)}")
        planned = self._planned.get((header.micro_batch, layers[header.layer].group))
        if planned is None or planned.number != header.step:
            raise ProtocolError(
                f"layer {header.layer} of step {header.step} before its STEP frame"
            )
        key = (self._sizes.kinds[header.layer], header.flags & _FUSED)
        layout = planned.layouts.get(key)
        if layout is None:
            layout = planned.layouts[key] = self._sizes.layout(
                header.layer,
                planned.num_query_rows,
                planned.num_tokens,
                is_fused=bool(header.flags & _FUSED),
            )
        if header.num_bytes != layout.num_bytes:
            raise ProtocolError(
                f"layer {header.layer} with {header.num_bytes:,} bytes; "
                f"{planned.num_query_rows:,} query rows and {planned.num_tokens:,} "
                f"tokens need {layout.num_bytes:,}"
            )
        return planned, layout
