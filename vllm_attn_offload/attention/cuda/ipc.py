# SPDX-License-Identifier: Apache-2.0
"""Layers whose rows a memory node reads, and answers, in memory of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_attn_offload.attention.cuda.streams import DeviceStreams
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.client.sent_step import SentStep


class SharedRows:
    """Rows of one micro-batch that no host copies.

    Args:
        nodes: Data channels.
        streams: Of the device.
    """

    def __init__(self, nodes: RemoteAttention, streams: DeviceStreams) -> None:
        self._nodes = nodes
        self._streams = streams

    def attend(
        self,
        metadata: AttentionOffloadMetadata,
        step: SentStep,
        layer: int,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
    ) -> bool:
        """Attend a layer of a step that only decodes.

        Args:
            metadata: The step.
            step: The same, as it was sent.
            layer: Index of the layer in the session's geometry.
            qkv: ``[num_tokens, heads, size]`` each, on the device.
            output: ``[num_tokens, num_heads, v_head_size]``; filled once the compute
                stream gets there.

        Returns:
            False where rows must pass through the host: nothing was sent.

        Raises:
            MemoryNodeError: The node is gone, too slow, or refused the layer.
        """
        if not self._post(step, layer, qkv):
            return False
        metadata.let_others_compute()

        def use(reply: torch.Tensor) -> Callable[[], None]:
            source = reply.view(output.dtype).view(output.shape)
            self._streams.launch(lambda: output.copy_(source))
            return self._streams.computed().wait

        num_bytes = output.numel() * output.element_size()
        if not self._nodes.collect_rows(step, layer, num_bytes, use):
            self._streams.launch(output.zero_)
        return True

    def _post(
        self,
        step: SentStep,
        layer: int,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> bool:
        query = qkv[0]
        num_bytes = sum(part.numel() for part in qkv) * query.element_size()
        buffer = self._nodes.rows_buffer(step, num_bytes)
        if buffer is None:
            return False
        rows = buffer.view(query.dtype).view(query.shape[0], -1)
        flat = [part.flatten(1) for part in qkv]
        self._streams.launch(lambda: torch.cat(flat, dim=1, out=rows))
        # Micro-batches share the next slot: nobody else may send until this is.
        self._streams.computed().wait()
        self._nodes.post_rows(step, layer, num_bytes)
        return True
