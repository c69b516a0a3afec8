# SPDX-License-Identifier: Apache-2.0
"""All memory nodes of one worker, as one attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from vllm_attn_offload.client.exchange_times import ExchangeTimes
from vllm_attn_offload.client.loss_guard import LossGuard
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.node_exchange import NodeExchange
from vllm_attn_offload.client.node_heads import NodeHeads
from vllm_attn_offload.client.partial_outputs import PartialOutputs
from vllm_attn_offload.client.partition import Partition
from vllm_attn_offload.client.sent_step import SentStep
from vllm_attn_offload.client.slowest_node import slowest_token_s
from vllm_attn_offload.client.step_partition import partition_step
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.frames import FrameFlag
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata

# Once per layer: an IntFlag makes an object of every result, which takes longer.
_WANT_LSE = FrameFlag.WANT_LSE.value


class RemoteAttention:
    """Sends layers to the nodes that hold the KV blocks and collects the output.

    Methods raise MemoryNodeError where a node is gone, too slow, or refused a layer,
    unless losses are tolerated: then the loss is kept and outputs are zero.

    Args:
        clients: One data channel per node.
        partition: How blocks are divided between them.
        geometry: The worker's layers, undivided.
        tolerate_loss: Keep the first failure in ``loss`` and let the step end with
            zeros, rather than raise.
    """

    def __init__(
        self,
        clients: Sequence[NodeClient],
        partition: Partition,
        geometry: SessionGeometry,
        *,
        tolerate_loss: bool = False,
    ) -> None:
        self._clients = clients
        self._partition = partition
        self.geometry = geometry
        self.layer_index = {
            layer.name: index for index, layer in enumerate(geometry.layers)
        }
        self._windows = [geometry.widest_window(i) for i in range(len(geometry.groups))]
        self._guard = LossGuard(tolerate=tolerate_loss)
        self._token_s = slowest_token_s(geometry)
        # One per node, by micro-batch and group.
        self._exchanges: dict[tuple[int, int], list[NodeExchange]] = {}
        self._times = ExchangeTimes()
        self._step = 0

    @property
    def loss(self) -> MemoryNodeError | None:
        """The first failure of a node."""
        return self._guard.loss

    def begin_step(
        self,
        batch: StepMetadata,
        micro_batch: int = 0,
        group: int = 0,
        decode_threshold: int = 1,
        on_half: bool = False,
    ) -> SentStep:
        """Divide a step of a KV group between the nodes and send each its share."""
        self._step += 1
        self._times.num_steps += 1
        sizes = self.geometry.groups[group].block_size, self._windows[group]
        partition = partition_step(batch, self._partition, *sizes, decode_threshold)
        rows = partition.remote_rows
        remote_rows = None if rows is None else torch.from_numpy(rows)
        is_plain = len(self._clients) == 1 and not partition.needs_merge
        key = (self._step, micro_batch, group)
        step = SentStep(*key, partition, remote_rows, is_plain, on_half)
        exchanges = self._make_exchanges(step)
        if self._guard.is_lost():
            return step
        with self._guard:
            for exchange, share in zip(exchanges, partition.shares, strict=True):
                exchange.begin_step(step, share, self._token_s)
        return step

    def post_layer(
        self,
        step: SentStep,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        *,
        with_lse: bool = False,
    ) -> None:
        """Send a layer's rows to every node, before any of them is waited for.

        Args:
            step: Result of ``begin_step`` for the layer's group.
            layer: Index of the layer in the session's geometry.
            query: ``[num_tokens, num_heads, head_size]``, CPU.
            key: ``[num_tokens, num_kv_heads, head_size]``; None: another layer's.
            value: ``[num_tokens, num_kv_heads, v_head_size]``, as ``key``.
            with_lse: Whether `collect` takes the log-sum-exp though no merge needs it.
        """
        self._times.num_layer_calls += 1
        if self._guard.loss is not None and self._guard.is_lost():
            return
        flags = _WANT_LSE if with_lse or step.partition.needs_merge else 0
        with self._guard:
            for exchange in self._exchanges[step.key]:
                exchange.post(layer, flags, query, key, value)

    def collect(
        self,
        step: SentStep,
        layer: int,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Wait for the nodes and take their part of a layer: the step's remote rows.

        Args:
            step: Result of ``begin_step``.
            layer: Index of the posted layer.
            output: ``[num_remote_rows, num_heads, v_head_size]``, filled.
            lse: ``[num_remote_rows, num_heads]`` fp32, filled; to be given where the
                step needs a merge with local parts, or it was asked for.
        """
        if self._guard.loss is None:
            with self._guard:
                self._receive(step, layer, output, lse)
        if self._guard.loss is not None and self._guard.is_lost():
            output.zero_()
            if lse is not None:
                lse.zero_()

    def exchange(
        self,
        step: SentStep,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Do what `post_layer` and `collect` do, in one call where that is possible.

        Args:
            step: Result of ``begin_step``, all of whose rows are the nodes'.
            layer: As for `post_layer`, like ``query``, ``key`` and ``value``.
            query: See there.
            key: See there.
            value: See there.
            output: ``[num_tokens, num_heads, v_head_size]``, filled.
        """
        if step.is_plain and self._guard.loss is None and output.is_contiguous():
            node = self._exchanges[step.key][0]
            with self._guard:
                if node.exchange(layer, query, key, value, output):
                    self._times.num_layer_calls += 1
                    return
        self.post_layer(step, layer, query, key, value)
        self.collect(step, layer, output)

    def rows_buffer(self, step: SentStep, num_bytes: int) -> torch.Tensor | None:
        """Device memory for a layer's rows ``q | k | v``, one per token.

        The buffer is to be complete, and nothing else sent, before `post_rows`.

        Args:
            step: Result of ``begin_step``.
            num_bytes: Bytes of all rows.

        Returns:
            uint8 ``[num_bytes]``; None where rows must pass through host memory.
        """
        is_whole = step.remote_rows is None and step.is_plain
        if self._guard.loss is None and is_whole:
            with self._guard:
                return self._exchanges[step.key][0].rows_buffer(num_bytes)
        return None

    def post_rows(self, step: SentStep, layer: int, num_bytes: int) -> None:
        """Send the layer whose rows are in the `rows_buffer`."""
        self._times.num_layer_calls += 1
        with self._guard:
            self._exchanges[step.key][0].post_rows(layer, num_bytes)

    def collect_rows(
        self,
        step: SentStep,
        layer: int,
        num_bytes: int,
        use: Callable[[torch.Tensor], Callable[[], None]],
    ) -> bool:
        """Wait for the output of a layer that `post_rows` sent.

        Args:
            step: Result of ``begin_step``.
            layer: Index of the posted layer.
            num_bytes: Bytes of the output.
            use: Enqueues the kernels that read the output, uint8 ``[num_bytes]`` of
                device memory; returns the function that waits for them.

        Returns:
            False where the node was lost.
        """
        started = time.perf_counter()
        if self._guard.loss is None:
            with self._guard:
                exchange = self._exchanges[step.key][0]
                exchange.receive_rows(layer, num_bytes, use)
        self._times.wait_s += time.perf_counter() - started
        return self._guard.loss is None

    @property
    def wait_s(self) -> float:
        """Seconds of waiting for nodes since this object was made."""
        return self._times.wait_s

    def times(self) -> dict[str, float]:
        """Sums since this object was made."""
        return asdict(self._times)

    def close(self) -> None:
        """End all data channels."""
        for client in self._clients:
            client.close()
        self._guard.forget_frames()

    def _make_exchanges(self, step: SentStep) -> list[NodeExchange]:
        """One per node, made with a group's first step of a micro-batch."""
        exchanges = self._exchanges.get(step.key)
        if exchanges is None:
            kind, num_nodes = self._partition.kind, len(self._clients)
            block_size = self.geometry.groups[step.group].block_size
            exchanges = self._exchanges[step.key] = [
                NodeExchange(
                    client,
                    [
                        NodeHeads.of_node(layer, kind, node, num_nodes)
                        for layer in self.geometry.layers
                    ],
                    step.group,
                    block_size,
                    self._times,
                )
                for node, client in enumerate(self._clients)
            ]
        return exchanges

    def _receive(
        self,
        step: SentStep,
        layer: int,
        output: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        started = time.perf_counter()
        exchanges = self._exchanges[step.key]
        if step.is_plain and lse is None and output.is_contiguous():
            exchanges[0].receive_into(layer, output)
            self._times.wait_s += time.perf_counter() - started
            return
        with_lse = lse is not None or step.partition.needs_merge
        size, partials = output.shape[2], self._partials(step, output)
        for node, exchange in enumerate(exchanges):
            if exchange.receive(layer, size, output.dtype, with_lse=with_lse):
                target = (output, lse) if partials is None else partials.part(node)
                exchange.place(layer, *target)
        received = time.perf_counter()
        self._times.wait_s += received - started
        if partials is not None:
            partials.merge_into(output, lse)
            self._times.merge_s += time.perf_counter() - received

    def _partials(self, step: SentStep, output: torch.Tensor) -> PartialOutputs | None:
        """Where replies belong that are merged with those of other nodes."""
        if self._partition.kind == "heads" or len(self._clients) == 1:
            return None
        num_rows, num_heads, size = output.shape
        partials = step.partials.get((num_heads, size))
        if partials is None:
            partials = step.partials[num_heads, size] = PartialOutputs(
                len(self._clients), num_rows, num_heads, size, output.dtype
            )
        return partials
