# SPDX-License-Identifier: Apache-2.0
"""A layer's attention from a GPU: which copy, kernel and message waits for which.

Nothing of a layer makes the compute stream wait for the host but the reply itself, and
the host waits for one event: its own rows. Where they stay on the device it also waits
until the reply is read, before the next one is received.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_attn_offload.attention.cuda.buffers import RemoteRows, StagedRows
from vllm_attn_offload.attention.cuda.ipc import SharedRows
from vllm_attn_offload.attention.cuda.metadata import CudaStep
from vllm_attn_offload.attention.cuda.prefill import LocalAttention
from vllm_attn_offload.attention.cuda.store import LayerStores
from vllm_attn_offload.attention.cuda.streams import DeviceStreams
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.layer_exchange import LayerExchange, Qkv
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.client.sent_step import SentStep

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _MicroBatchBuffers:
    """Buffers of one micro-batch: a copy stream, rows out, rows back."""

    def __init__(self, nodes: RemoteAttention, streams: DeviceStreams) -> None:
        self.streams = streams
        self.rows = StagedRows(streams)
        self.remote = RemoteRows(streams)
        self.shared = SharedRows(nodes, streams)


class CudaExchange(LayerExchange):
    """Moves layers between a device and the memory nodes.

    Args:
        nodes: Data channels; they take and give tensors of the host.
        make_streams: New streams of the device, for each micro-batch.
        attention: Attends prefills on the device.
    """

    def __init__(
        self,
        nodes: RemoteAttention,
        make_streams: Callable[[], DeviceStreams],
        attention: LocalAttention,
    ) -> None:
        self._nodes = nodes
        self._make_streams = make_streams
        self._attention = attention
        self._buffers: list[_MicroBatchBuffers] = []
        self._stores = LayerStores(nodes, make_streams())

    def attend(
        self,
        metadata: AttentionOffloadMetadata,
        layer: int,
        qkv: Qkv,
        output: torch.Tensor,
        attention: LayerAttention,
    ) -> None:
        """Attend one layer of a step.

        Args:
            metadata: The step, or one micro-batch of it.
            layer: Index of the layer in the session's geometry.
            qkv: ``[num_tokens, heads, size]`` each, on the device.
            output: ``[num_tokens, num_heads, v_head_size]``; filled once the compute
                stream gets there.
            attention: Attributes of the layer.

        Raises:
            MemoryNodeError: A node is gone, too slow, or refused this layer or one
                before it that was only stored.
        """
        if metadata.step is None:
            # Stores of the step before must be sent before this step is.
            self._stores.finish()
        step = metadata.ensure_sent(self._nodes, layer)
        partition = step.partition
        query, key, value = qkv
        # Layers that share KV, or have sinks, are refused on GPUs (`compatibility`).
        assert key is not None
        assert value is not None
        rows = (query, key, value)
        if not partition.prefills:
            self._attend_remotely(metadata, step, layer, rows, output)
            return
        source = metadata.source
        assert isinstance(source, CudaStep)
        remote_rows = partition.remote_rows
        if remote_rows is not None and not remote_rows.size:
            self._stores.post(step, layer, rows)
            self._attention.attend(rows, output, source, attention)
        else:
            self._attend_both(metadata, step, layer, rows, output, attention)

    def close(self) -> None:
        """Wait until nothing is being sent; the nodes were closed before."""
        self._stores.close()

    def _attend_remotely(
        self,
        metadata: AttentionOffloadMetadata,
        step: SentStep,
        layer: int,
        qkv: Rows,
        output: torch.Tensor,
    ) -> None:
        buffers = self._of(metadata.micro_batch)
        if buffers.shared.attend(metadata, step, layer, qkv, output):
            return
        rows, mark = buffers.rows.copy_out(qkv, may_read_in_place=True)
        # Its kernels are queued behind ours while ours run.
        metadata.let_others_compute()
        mark.wait()
        self._nodes.post_layer(step, layer, rows[0], rows[1], rows[2])
        metadata.let_others_compute()
        reply = buffers.remote.host_out(output)
        self._nodes.collect(step, layer, reply)
        buffers.streams.copy(output, reply)
        buffers.streams.join()

    def _attend_both(
        self,
        metadata: AttentionOffloadMetadata,
        step: SentStep,
        layer: int,
        qkv: Rows,
        output: torch.Tensor,
        attention: LayerAttention,
    ) -> None:
        """Attend prefills here, other rows there, and merge what has both parts."""
        buffers, source = self._of(metadata.micro_batch), metadata.source
        assert isinstance(source, CudaStep)
        rows, mark = buffers.rows.copy_out(qkv, may_read_in_place=True)
        lse = self._attention.attend(qkv, output, source, attention)
        mark.wait()
        self._nodes.post_layer(step, layer, rows[0], rows[1], rows[2])
        remote = buffers.remote
        remote.begin(step, output)
        self._nodes.collect(step, layer, remote.out, remote.lse)
        remote.copy_in()
        buffers.streams.join()
        self._attention.merge(output, lse, remote.on_device)

    def _of(self, micro_batch: int) -> _MicroBatchBuffers:
        while len(self._buffers) <= micro_batch:
            self._buffers.append(_MicroBatchBuffers(self._nodes, self._make_streams()))
        return self._buffers[micro_batch]
