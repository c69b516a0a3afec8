# SPDX-License-Identifier: Apache-2.0
"""One micro-batch's exchange with one memory node: pack, post, receive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_attn_offload.client.exchange_times import ExchangeTimes
from vllm_attn_offload.client.layer_payload import LayerPayload, bytes_at
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.node_heads import NodeHeads
from vllm_attn_offload.client.sent_step import SentStep
from vllm_attn_offload.client.step_partition import NodeShare
from vllm_attn_offload.protocol.frames import FrameFlag
from vllm_attn_offload.protocol.step import StepMetadata, write_step

# Once per layer: an IntFlag makes an object of every result, which takes longer.
_FUSED = FrameFlag.FUSED.value
_ON_HALF = FrameFlag.ON_HALF.value
#: Query rows that a kernel attends with for one read of K and V.
ROWS_PER_READ = 16
#: Payload of an acknowledgement.
_NOTHING = memoryview(bytearray(0))


class NodeExchange:
    """Exchanges the layers of one KV group and micro-batch with one node.

    Its buffers are kept between steps. Every method but the constructor and `place`
    raises MemoryNodeError where the node is gone, too slow, or refused the layer.

    Args:
        client: Data channel to the node.
        heads: The node's heads of every layer.
        group: Index of the KV group.
        block_size: Tokens of its blocks.
        times: Sums that this exchange adds to.
    """

    def __init__(
        self,
        client: NodeClient,
        heads: Sequence[NodeHeads],
        group: int,
        block_size: int,
        times: ExchangeTimes,
    ) -> None:
        self._client = client
        self._group = group
        self._block_size = block_size
        self._times = times
        self._heads = heads
        payloads = {each: _payload_of(each) for each in heads}
        self._payloads = [payloads[each] for each in heads]
        self._step = self._micro_batch = 0
        self._num_rows = 0
        self._has_reply = False
        self._positions: torch.Tensor | None = None
        self._query_rows: torch.Tensor | None = None
        self._stored_rows: torch.Tensor | None = None
        self._allowance_s = 0.0
        self._call = client.layer_call()
        self._is_whole = False
        self._step_buffer = memoryview(bytearray(0))
        self._out = self._lse = torch.empty(0)
        self._reply = torch.empty(0, dtype=torch.uint8)
        self._reply_shape: tuple[int, int, int, torch.dtype] | None = None
        self._reply_bytes = memoryview(b"")

    def begin_step(
        self, sent: SentStep, share: NodeShare, slowest_token_s: float
    ) -> None:
        """Send the node's share of a step; later layers belong to it.

        Args:
            sent: The step.
            share: Rows and tokens of the node.
            slowest_token_s: Seconds that a query row may take for one cached token
                before the node counts as lost, other engines' turns included.
        """
        self._step, self._micro_batch = sent.number, sent.micro_batch
        self._query_rows, self._stored_rows, self._positions = (
            None if rows is None else torch.from_numpy(rows)
            for rows in (share.query_rows, share.stored_rows, share.positions)
        )
        step = share.step
        self._num_rows = step.num_query_rows
        self._is_whole = 0 < self._num_rows == step.num_tokens and all(
            rows is None
            for rows in (self._query_rows, self._stored_rows, self._positions)
        )
        if self._call is not None:
            self._call.begin_step(sent.number, sent.micro_batch)
        self._allowance_s = slowest_token_s * _num_scores(step, self._block_size)
        num_bytes = step.num_bytes
        if self._step_buffer.nbytes < num_bytes:
            self._step_buffer = memoryview(bytearray(2 * num_bytes))
        write_step(step, self._step_buffer, self._times.nanoseconds())
        payload = self._step_buffer[:num_bytes]
        flags = _ON_HALF if sent.on_half else 0
        names = (sent.number, sent.micro_batch, self._group)
        self._client.post_step(*names, payload, flags)

    def post(
        self,
        layer: int,
        flags: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
    ) -> None:
        """Pack the node's rows of a layer and send them, if there are any.

        Args:
            layer: Index of the layer in the session's geometry.
            flags: ``FrameFlag`` that the layer needs.
            query: ``[num_tokens, num_heads, head_size]``, CPU.
            key: ``[num_tokens, num_kv_heads, head_size]``; None: another layer's.
            value: ``[num_tokens, num_kv_heads, v_head_size]``, as ``key``.
        """
        times, started = self._times, time.perf_counter()
        packer, buffer = self._payloads[layer], self._client.payload_buffer
        payload = None
        if key is None or value is None:
            payload = packer.planar((query,), (self._query_rows,), buffer)
        elif self._query_rows is None and self._stored_rows is None:
            payload = packer.fused(query, key, value)
            flags |= 0 if payload is None else _FUSED
        if payload is None:
            assert key is not None
            assert value is not None
            stored = self._stored_rows
            rows = (self._query_rows, stored, stored)
            payload = packer.planar((query, key, value), rows, buffer)
        packed = time.perf_counter()
        times.pack_s += packed - started
        self._has_reply = payload.nbytes > 0 and self._client.post_layer(
            self._step,
            self._micro_batch,
            layer,
            flags,
            payload,
            has_queries=self._num_rows > 0,
        )
        times.send_s += time.perf_counter() - packed

    def exchange(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
    ) -> bool:
        """Send a layer's rows, all of them, and receive the output, in one call.

        Args:
            layer: Index of the layer in the session's geometry.
            query: As for `post`.
            key: As for `post`.
            value: As for `post`.
            output: As for `receive_into`.

        Returns:
            False where it takes `post` and `receive_into`; nothing was done.
        """
        call, times = self._call, self._times
        if (
            call is None
            or not self._is_whole
            or not call.name_rows(query, key, value, output)
        ):
            return False
        started = time.perf_counter()
        self._client.exchange(call, layer, self._allowance_s)
        packed_s, sent_s = call.packed_s, call.sent_s
        times.pack_s += packed_s
        times.send_s += sent_s
        times.wait_s += time.perf_counter() - started - packed_s - sent_s
        return True

    def receive_into(self, layer: int, output: torch.Tensor) -> None:
        """Receive the node's output, which is all of ``output``, where it belongs.

        Args:
            layer: Index of the posted layer.
            output: ``[num_rows, num_heads, v_head_size]``, CPU, contiguous.
        """
        if self._has_reply:
            target = bytes_at(output.data_ptr(), output.nbytes)
            self._client.receive_out(layer, target, self._allowance_s)

    def receive(
        self, layer: int, v_head_size: int, dtype: torch.dtype, *, with_lse: bool
    ) -> bool:
        """Receive the node's output, to be placed by `place`; False if there is none.

        Args:
            layer: Index of the posted layer.
            v_head_size: Size of one value head.
            dtype: dtype of the output.
            with_lse: Whether the log-sum-exp was asked for.
        """
        if not self._has_reply:
            return False
        if not self._num_rows:
            self._client.receive_out(layer, _NOTHING, self._allowance_s)
            return False
        self._lay_out_reply(self._heads[layer].num_query_heads, v_head_size, dtype)
        num_bytes = self._out.nbytes + (self._lse.nbytes if with_lse else 0)
        target = self._reply_bytes[:num_bytes]
        self._client.receive_out(layer, target, self._allowance_s)
        return True

    def place(self, layer: int, output: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Copy what was received to its rows and heads.

        Args:
            layer: Index of the layer.
            output: ``[num_remote_rows, num_heads, v_head_size]``.
            lse: ``[num_remote_rows, num_heads]`` fp32; None: not wanted.
        """
        pairs = [(output, self._out)]
        if lse is not None:
            pairs.append((lse, self._lse))
        for target, source in pairs:
            if self._positions is None:
                target[:, self._heads[layer].query] = source
            else:
                target.index_copy_(0, self._positions, source)

    def rows_buffer(self, num_bytes: int) -> torch.Tensor | None:
        """Device memory, uint8 ``[num_bytes]``, for all rows of a layer.

        None where rows must pass through host memory.
        """
        if self._query_rows is not None or self._stored_rows is not None:
            return None
        return self._client.rows_buffer(num_bytes)

    def post_rows(self, layer: int, num_bytes: int) -> None:
        """Send the layer whose rows are in the `rows_buffer`."""
        started = time.perf_counter()
        self._client.post_rows(self._step, self._micro_batch, layer, num_bytes)
        self._times.send_s += time.perf_counter() - started

    def receive_rows(
        self,
        layer: int,
        num_bytes: int,
        use: Callable[[torch.Tensor], Callable[[], None]],
    ) -> None:
        """Receive output in device memory.

        Args:
            layer: Index of the posted layer.
            num_bytes: Bytes of the output.
            use: Enqueues the kernels that read the output, uint8 ``[num_bytes]``;
                returns the function that waits for them.
        """
        rows = self._client.receive_rows(layer, num_bytes, self._allowance_s)
        self._client.keep_rows(use(rows))

    def _lay_out_reply(
        self, num_heads: int, v_head_size: int, dtype: torch.dtype
    ) -> None:
        shape = (self._num_rows, num_heads, v_head_size, dtype)
        if shape == self._reply_shape:
            return
        self._reply_shape = shape
        out_bytes = self._num_rows * num_heads * v_head_size * dtype.itemsize
        num_bytes = out_bytes + self._num_rows * num_heads * 4
        if self._reply.numel() < num_bytes:
            self._reply = torch.empty(num_bytes, dtype=torch.uint8)
        out = self._reply[:out_bytes].view(dtype)
        self._out = out.view(self._num_rows, num_heads, v_head_size)
        lse = self._reply[out_bytes:num_bytes].view(torch.float32)
        self._lse = lse.view(self._num_rows, num_heads)
        array: npt.NDArray[np.uint8] = self._reply.numpy()
        self._reply_bytes = array.data[:num_bytes]


def _payload_of(heads: NodeHeads) -> LayerPayload:
    return LayerPayload() if heads.has_all else LayerPayload(heads.query, heads.kv)


def _num_scores(step: StepMetadata, block_size: int) -> float:
    """Query rows times the tokens that they see; 16 rows share what they read."""
    starts = step.query_start_loc
    reads = -((starts[:-1] - starts[1:]) // ROWS_PER_READ)
    return float(reads @ step.tokens_held(block_size))
