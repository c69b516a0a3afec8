# SPDX-License-Identifier: Apache-2.0
"""A layer's exchange with one node in one call of the C library."""

from __future__ import annotations

import ctypes

import torch

from vllm_attn_offload.native.channel import (
    OTHER_FRAME,
    TOO_LONG,
    Exchange,
    load_channels,
)
from vllm_attn_offload.native.waits import READY, TIMED_OUT, milliseconds
from vllm_attn_offload.protocol.frames import FrameHeader
from vllm_attn_offload.transport.shared_memory import (
    NOTHING_TAKEN,
    SharedMemoryTransport,
)

_Layout = tuple[tuple[int, ...] | torch.dtype, ...]


class LayerCall:
    """Rows of q, k and v of a whole step, and where their output belongs.

    Args:
        transport: Channel to the node.
        take_timeout_s: Longest wait for a slot.
    """

    def __init__(self, transport: SharedMemoryTransport, take_timeout_s: float) -> None:
        channels = load_channels()
        assert channels is not None
        self._transport, self._function = transport, channels.exchange
        self._call = Exchange(
            channel=transport.channel_address, take_ms=milliseconds(take_timeout_s)
        )
        self._ref = ctypes.byref(self._call)
        # Layers of a step are alike: what was found for one holds for the next.
        self._layout: _Layout | None = None
        self._is_possible = False

    @property
    def out_bytes(self) -> int:
        """Bytes of the output."""
        return self._call.out_bytes

    @property
    def is_sent(self) -> bool:
        """Whether the rows left, in the last `run`."""
        return bool(self._call.is_sent)

    @property
    def packed_s(self) -> float:
        """Seconds in which they were packed."""
        return self._call.packed_ns * 1e-9

    @property
    def sent_s(self) -> float:
        """Seconds in which they left."""
        return self._call.sent_ns * 1e-9

    def begin_step(self, number: int, micro_batch: int) -> None:
        """Name the step that later layers belong to."""
        self._call.step, self._call.micro_batch = number, micro_batch

    def name_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
    ) -> bool:
        """Name a layer's tensors, which stay until `run` is over.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, CPU.
            key: ``[num_tokens, num_kv_heads, head_size]``; None: another layer's.
            value: ``[num_tokens, num_kv_heads, v_head_size]``, as ``key``.
            output: ``[num_tokens, num_heads, v_head_size]``, contiguous.

        Returns:
            False where rows are not in one piece each, or not of one dtype.
        """
        call = self._call
        if key is None or value is None:
            layout: _Layout = (query.stride(), query.shape, query.dtype)
            call.key = None
        else:
            layout = (
                *(query.stride(), query.shape, query.dtype),
                *(key.stride(), key.shape, key.dtype),
                *(value.stride(), value.shape, value.dtype),
            )
            call.key, call.value = key.data_ptr(), value.data_ptr()
        if layout != self._layout:
            self._layout = layout
            self._is_possible = self._describe(query, key, value)
        call.query = query.data_ptr()
        call.out, call.out_bytes = output.data_ptr(), output.nbytes
        return self._is_possible

    def run(self, layer: int, timeout_s: float, header: FrameHeader) -> bool:
        """Send the rows and wait for the output.

        Args:
            layer: Index of the layer in the session's geometry.
            timeout_s: Deadline for the answer.
            header: Overwritten with that of an answer of another kind.

        Returns:
            True where the output is filled, False where something else came.

        Raises:
            OSError: The node is gone, or too slow.
            ProtocolError: What came is not a frame.
            ValueError: The rows do not fit the channel.
        """
        call = self._call
        call.layer, call.is_sent, call.deadline_ns = layer, 0, 0
        call.answer_ms = milliseconds(timeout_s)
        status = self._transport.call(self._function, self._ref)
        if status == READY:
            return True
        if status == TOO_LONG and not call.is_sent:
            raise ValueError(
                "rows were to be sent that do not fit this channel. Keep to the limits "
                "of the session."
            )
        if status == TIMED_OUT and not call.is_sent:
            raise TimeoutError(NOTHING_TAKEN)
        if status == OTHER_FRAME:
            status = READY
        self._transport.read_header(header, status, timeout_s)
        return False

    def _describe(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
    ) -> bool:
        call, item_bytes = self._call, query.element_size()
        call.num_rows = query.shape[0]
        parts = [query]
        call.q_bytes, call.query_stride = _row(query)
        if key is not None and value is not None:
            call.k_bytes, call.key_stride = _row(key)
            call.v_bytes, call.value_stride = _row(value)
            parts += [key, value]
        return all(
            part.dtype == query.dtype
            and part.shape[0] == query.shape[0]
            and part.stride()[1:] == (part.shape[2], 1)
            and part.stride()[0] * item_bytes >= _row(part)[0]
            for part in parts
        )


def _row(part: torch.Tensor) -> tuple[int, int]:
    """Bytes of a row, and from row to row."""
    item_bytes = part.element_size()
    return part.shape[1] * part.shape[2] * item_bytes, part.stride()[0] * item_bytes
