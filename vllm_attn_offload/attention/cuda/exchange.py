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
from vllm_attn_offload.attention.kept_kv import KeptKV
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.layer_exchange import LayerExchange, Qkv
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.client.sent_step import SentStep

#: q, k and v.
_NUM_PARTS = 3


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
        streams = make_streams()
        self._stores = LayerStores(nodes, streams)
        self._kept = KeptKV(nodes.geometry, streams.launch)

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
        if not partition.prefills and attention.sinks is None:
            self._stores.finish()
            self._attend_remotely(metadata, step, layer, _given(qkv), output)
            return
        remote_rows = partition.remote_rows
        if not partition.prefills or remote_rows is None or remote_rows.size:
            # Another group's layers may only have been stored in this step.
            self._stores.finish()
            self._attend_both(metadata, step, layer, qkv, output, attention)
            return
        parts = _given(qkv)
        if len(parts) == _NUM_PARTS:
            self._stores.post(step, layer, (parts[0], parts[1], parts[2]))
        lse = self._attend_here(metadata, step, layer, qkv, output, attention)
        if attention.sinks is not None:
            self._attention.add_sinks(output, lse, attention.sinks)

    def close(self) -> None:
        """Wait until nothing is being sent; the nodes were closed before."""
        self._stores.close()

    def _attend_remotely(
        self,
        metadata: AttentionOffloadMetadata,
        step: SentStep,
        layer: int,
        parts: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> None:
        buffers = self._of(metadata.micro_batch)
        if len(parts) == _NUM_PARTS and buffers.shared.attend(
            metadata, step, layer, (parts[0], parts[1], parts[2]), output
        ):
            return
        rows, mark = buffers.rows.copy_out(parts, may_read_in_place=True)
        # Its kernels are queued behind ours while ours run.
        metadata.let_others_compute()
        mark.wait()
        self._nodes.post_layer(step, layer, *_padded(rows))
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
        qkv: Qkv,
        output: torch.Tensor,
        attention: LayerAttention,
    ) -> None:
        """Attend prefills here, other rows there, and merge what has both parts.

        Without a local part only to have the log-sum-exp that sinks need.
        """
        buffers, sinks = self._of(metadata.micro_batch), attention.sinks
        rows, mark = buffers.rows.copy_out(_given(qkv), may_read_in_place=True)
        lse = self._attend_here(metadata, step, layer, qkv, output, attention)
        metadata.let_others_compute()
        mark.wait()
        with_lse = sinks is not None
        self._nodes.post_layer(step, layer, *_padded(rows), with_lse=with_lse)
        metadata.let_others_compute()
        remote = buffers.remote
        remote.begin(step, output, with_lse=with_lse)
        self._nodes.collect(step, layer, remote.out, remote.lse)
        remote.copy_in()
        buffers.streams.join()
        self._attention.merge(output, lse, remote.on_device)
        if sinks is not None:
            self._attention.add_sinks(output, lse, sinks)

    def _attend_here(
        self,
        metadata: AttentionOffloadMetadata,
        step: SentStep,
        layer: int,
        qkv: Qkv,
        output: torch.Tensor,
        attention: LayerAttention,
    ) -> torch.Tensor:
        """Log-sum-exp ``[num_heads, num_tokens]`` of the local part, -inf: none.

        Once rows are on their way out, so that nodes do not wait for the rounding.
        """
        if not step.partition.prefills:
            streams = self._of(metadata.micro_batch).streams
            streams.launch(output.zero_)
            shape = (output.shape[1], output.shape[0])
            return torch.full(shape, -torch.inf, device=output.device)
        source = metadata.source
        assert isinstance(source, CudaStep)
        local = (qkv[0], *self._kept.local_kv(metadata, layer, qkv))
        return self._attention.attend(local, output, source, attention)

    def _of(self, micro_batch: int) -> _MicroBatchBuffers:
        while len(self._buffers) <= micro_batch:
            self._buffers.append(_MicroBatchBuffers(self._nodes, self._make_streams()))
        return self._buffers[micro_batch]


def _given(qkv: Qkv) -> tuple[torch.Tensor, ...]:
    """All three, or q alone where the layer shares k and v of another."""
    return tuple(part for part in qkv if part is not None)


def _padded(
    rows: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """q, k and v; the last two are None where the layer shares those of another."""
    if len(rows) < _NUM_PARTS:
        return rows[0], None, None
    return rows[0], rows[1], rows[2]
