# SPDX-License-Identifier: Apache-2.0
"""One micro-batch's exchange with one memory node: buffers, rows, pending reply."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vllm_attn_offload.client.layer_payload import LayerPayload
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.step_partition import NodeStep
from vllm_attn_offload.protocol.frames import FrameFlag
from vllm_attn_offload.protocol.step import step_num_bytes, write_step

# Once per layer: an IntFlag makes an object of every result, which takes longer.
_FUSED = FrameFlag.FUSED.value
#: Payload of an acknowledgement.
_NOTHING = memoryview(bytearray(0))


class NodeExchange:
    """What a micro-batch needs of a node; its buffers are kept between steps.

    Args:
        client: Data channel to the node.
        query_heads: Heads of q that the node attends with.
        kv_heads: Heads of k and v that it stores; None: all, and all of q.
    """

    def __init__(
        self, client: NodeClient, query_heads: slice, kv_heads: slice | None
    ) -> None:
        self.client = client
        self.heads = query_heads
        self.positions: torch.Tensor | None = None
        self.has_reply = False
        self.num_rows = 0
        self.out = torch.empty(0)
        self.lse = torch.empty(0)
        self._payload = LayerPayload(query_heads if kv_heads else None, kv_heads)
        self._query_rows: torch.Tensor | None = None
        self._stored_rows: torch.Tensor | None = None
        self._allowance_s = 0.0
        self._step_buffer = memoryview(bytearray(0))
        self._reply = torch.empty(0, dtype=torch.uint8)
        self._reply_shape: tuple[int, int, torch.dtype] | None = None
        self._reply_bytes = memoryview(b"")

    def begin_step(
        self, number: int, micro_batch: int, part: NodeStep, slowest_token_s: float
    ) -> None:
        """Send the node's part of a step.

        Raises:
            MemoryNodeError: The node is gone.
        """
        self._query_rows, self._stored_rows, self.positions = (
            None if rows is None else torch.from_numpy(rows)
            for rows in (part.query_rows, part.stored_rows, part.positions)
        )
        step = part.step
        self.num_rows = step.num_query_rows
        self._allowance_s = slowest_token_s * int(step.seq_lens.sum())
        num_bytes = step_num_bytes(
            step.num_reqs, step.num_tokens, step.block_table.shape[1]
        )
        if self._step_buffer.nbytes < num_bytes:
            self._step_buffer = memoryview(bytearray(2 * num_bytes))
        write_step(step, self._step_buffer)
        self.client.post_step(number, micro_batch, 0, self._step_buffer[:num_bytes])

    def pack(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[memoryview, int]:
        """The node's rows of a layer, and the flags that say how they lie."""
        if self._query_rows is None and self._stored_rows is None:
            fused = self._payload.fused(query, key, value)
            if fused is not None:
                return fused, _FUSED
        planar = self._payload.planar(
            query,
            key,
            value,
            self._query_rows,
            self._stored_rows,
            self.client.payload_buffer,
        )
        return planar, 0

    def post(
        self, step: int, micro_batch: int, layer: int, flags: int, payload: memoryview
    ) -> None:
        """Send a layer's rows, if there are any.

        Raises:
            MemoryNodeError: The node is gone.
        """
        self.has_reply = False
        if payload.nbytes:
            self.has_reply = self.client.post_layer(
                step,
                micro_batch,
                layer,
                flags,
                payload,
                has_queries=self.num_rows > 0,
            )

    def rows_buffer(self, num_bytes: int) -> torch.Tensor | None:
        """Device memory for all rows of a layer; None where they pass the host.

        Raises:
            MemoryNodeError: The node is gone.
        """
        if self._query_rows is not None or self._stored_rows is not None:
            return None
        return self.client.rows_buffer(num_bytes)

    def receive_rows(self, layer: int, num_bytes: int) -> torch.Tensor:
        """The node's output where the node left it, in device memory.

        Raises:
            MemoryNodeError: The node is gone, too slow, or refused the layer.
        """
        return self.client.receive_rows(layer, num_bytes, self._allowance_s)

    def receive_into(self, layer: int, out: memoryview) -> None:
        """Receive the node's output where it belongs; ``out`` has its size.

        Raises:
            MemoryNodeError: The node is gone, too slow, or refused the layer.
        """
        if self.has_reply:
            self.client.receive_out(layer, out, self._allowance_s)

    def receive(
        self, layer: int, v_head_size: int, dtype: torch.dtype, *, with_lse: bool
    ) -> bool:
        """Receive the node's output into ``out`` and ``lse``.

        ``out`` is ``[num_rows, heads, v_head_size]``, ``lse`` ``[num_rows, heads]``
        fp32.

        Returns:
            Whether there is any.

        Raises:
            MemoryNodeError: The node is gone, too slow, or refused the layer.
        """
        if not self.has_reply:
            return False
        if not self.num_rows:
            self.client.receive_out(layer, _NOTHING, self._allowance_s)
            return False
        self._lay_out_reply(v_head_size, dtype)
        num_bytes = self.out.nbytes + (self.lse.nbytes if with_lse else 0)
        target = self._reply_bytes[:num_bytes]
        self.client.receive_out(layer, target, self._allowance_s)
        return True

    def _lay_out_reply(self, v_head_size: int, dtype: torch.dtype) -> None:
        shape = (self.num_rows, v_head_size, dtype)
        if shape == self._reply_shape:
            return
        self._reply_shape = shape
        num_heads = self.heads.stop - self.heads.start
        out_bytes = self.num_rows * num_heads * v_head_size * dtype.itemsize
        num_bytes = out_bytes + self.num_rows * num_heads * 4
        if self._reply.numel() < num_bytes:
            self._reply = torch.empty(num_bytes, dtype=torch.uint8)
        out = self._reply[:out_bytes].view(dtype)
        self.out = out.view(self.num_rows, num_heads, v_head_size)
        lse = self._reply[out_bytes:num_bytes].view(torch.float32)
        self.lse = lse.view(self.num_rows, num_heads)
        array: npt.NDArray[np.uint8] = self._reply.numpy()
        self._reply_bytes = array.data[:num_bytes]
