# SPDX-License-Identifier: Apache-2.0
"""Layers that nodes only store: k and v leave behind the device's back."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from vllm_attn_offload.attention.cuda.buffers import StagedRows
from vllm_attn_offload.attention.cuda.streams import DeviceStreams, Mark
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.client.sent_step import SentStep

#: One layer's rows are sent while the next one's are copied.
_NUM_BUFFERS = 2


class LayerStores:
    """Sends k and v in a thread, in order, while the device goes on.

    Args:
        nodes: The data channels; between `post` and `finish` nobody else uses them.
        streams: Of the device, for this object alone.
    """

    def __init__(self, nodes: RemoteAttention, streams: DeviceStreams) -> None:
        self._nodes = nodes
        self._rows = [StagedRows(streams) for _ in range(_NUM_BUFFERS)]
        self._sent: list[Future[None] | None] = [None] * _NUM_BUFFERS
        self._next = 0
        self._thread = ThreadPoolExecutor(1, "store-layers")

    def post(
        self,
        step: SentStep,
        layer: int,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        """Copy out a layer's rows and send k and v in the background.

        Args:
            step: Result of ``begin_step``.
            layer: Index of the layer in the session's geometry.
            qkv: ``[num_tokens, heads, size]`` each, on the device; q is not sent.

        Raises:
            MemoryNodeError: An earlier layer could not be sent.
        """
        query, key, value = qkv
        index, self._next = self._next, (self._next + 1) % _NUM_BUFFERS
        self._wait_for(index)
        # What kernels write next into the memory of key and value nobody knows.
        (key, value), mark = self._rows[index].copy_out(
            (key, value), may_read_in_place=False
        )
        no_rows = torch.empty(0, *query.shape[1:], dtype=query.dtype)
        self._sent[index] = self._thread.submit(
            self._send, step, layer, (no_rows, key, value), mark
        )

    def finish(self) -> None:
        """Wait until all is sent.

        Raises:
            MemoryNodeError: A layer could not be sent.
        """
        for offset in range(_NUM_BUFFERS):
            self._wait_for((self._next + offset) % _NUM_BUFFERS)

    def close(self) -> None:
        """End the thread; what could not be sent is lost."""
        self._thread.shutdown()

    def _wait_for(self, index: int) -> None:
        sent, self._sent[index] = self._sent[index], None
        if sent is not None:
            sent.result()

    def _send(
        self,
        step: SentStep,
        layer: int,
        rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mark: Mark,
    ) -> None:
        # Inference mode belongs to a thread.
        with torch.inference_mode():
            mark.wait()
            self._nodes.post_layer(step, layer, *rows)
            # A node acknowledges now and then what it only stores.
            self._nodes.collect(step, layer, rows[0])
