# SPDX-License-Identifier: Apache-2.0
"""All memory nodes of one worker, as one attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from vllm_attn_offload.client.exchange_times import ExchangeTimes
from vllm_attn_offload.client.layer_payload import bytes_at
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.node_exchange import NodeExchange
from vllm_attn_offload.client.partial_outputs import PartialOutputs
from vllm_attn_offload.client.partition import Partition
from vllm_attn_offload.client.step_partition import (
    BatchStep,
    StepPartition,
    partition_step,
)
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.frames import FrameFlag
from vllm_attn_offload.protocol.messages import SessionGeometry

#: Attention is allowed to read KV at this rate before its node counts as lost.
_SLOWEST_BYTES_PER_S = 50e6
# Once per layer: an IntFlag makes an object of every result, which takes longer.
_WANT_LSE = FrameFlag.WANT_LSE.value


@dataclass(slots=True)
class SentStep:
    """A step that was sent; ``plan`` says which rows are attended where."""

    number: int
    micro_batch: int
    plan: StepPartition
    remote_rows: torch.Tensor | None
    partials: PartialOutputs | None = None


class RemoteAttention:
    """Sends layers to the nodes that hold the KV blocks and collects the output.

    Args:
        clients: One data channel per node.
        partition: How blocks are divided between them.
        geometry: The worker's layers, undivided.
        tolerate_loss: Keep the first failure in ``loss`` and let the step end with
            zeros, rather than raise.
    """

    def __init__(
        self,
        clients: list[NodeClient],
        partition: Partition,
        geometry: SessionGeometry,
        *,
        tolerate_loss: bool = False,
    ) -> None:
        self.loss: MemoryNodeError | None = None
        self._clients = clients
        self._partition = partition
        self._geometry = geometry
        self._block_size = geometry.groups[0].block_size
        self._tolerate_loss = tolerate_loss
        self._token_s = _slowest_token_s(geometry)
        self._lanes: list[list[NodeExchange]] = []
        self._times = ExchangeTimes()
        self._step = 0

    def begin_step(self, batch: BatchStep, micro_batch: int = 0) -> SentStep:
        """Divide a step between the nodes and send each its part.

        Raises:
            MemoryNodeError: A node is gone.
        """
        self._step += 1
        self._times.num_steps += 1
        plan = partition_step(batch, self._partition, self._block_size)
        rows = plan.remote_rows
        step = SentStep(
            self._step,
            micro_batch,
            plan,
            None if rows is None else torch.from_numpy(rows),
        )
        while len(self._lanes) <= micro_batch:
            self._lanes.append([self._lane(node) for node in range(len(self._clients))])
        if self.loss is not None:
            self._raise_if_lost()
            return step
        try:
            self._post_step(step)
        except MemoryNodeError as error:
            self._lose(error)
        return step

    def post_layer(
        self,
        step: SentStep,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Send a layer's rows to every node, before any of them is waited for.

        Args:
            step: Result of ``begin_step``.
            layer: Index of the layer in the session's geometry.
            query: ``[num_tokens, num_heads, head_size]``, CPU.
            key: ``[num_tokens, num_kv_heads, head_size]``.
            value: ``[num_tokens, num_kv_heads, v_head_size]``.

        Raises:
            MemoryNodeError: A node is gone.
        """
        self._times.num_layer_calls += 1
        if self.loss is not None:
            return self._raise_if_lost()
        try:
            self._post_parts(step, layer, (query, key, value))
        except MemoryNodeError as error:
            self._lose(error)

    def collect(
        self,
        step: SentStep,
        layer: int,
        output: torch.Tensor,
        local_lse: torch.Tensor | None = None,
    ) -> None:
        """Wait for the nodes and complete a layer's output.

        Args:
            step: As posted.
            layer: As posted.
            output: ``[num_tokens, num_heads, v_head_size]``; holds what was attended
                locally, and finite numbers elsewhere where ``local_lse``
                is given.
            local_lse: ``[num_tokens, num_heads]`` fp32 of the local part, -inf where
                there is none.

        Raises:
            MemoryNodeError: A node is gone, too slow, or refused the layer.
        """
        if self.loss is None:
            try:
                self._receive(step, layer, output, local_lse)
            except MemoryNodeError as error:
                self._lose(error)
        if self.loss is not None:
            self._raise_if_lost()
            output.zero_()

    def collect_remote(
        self,
        step: SentStep,
        layer: int,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Wait for the nodes and take their part alone, of the plan's remote rows.

        Args:
            step: As posted.
            layer: As posted.
            output: ``[num_remote_rows, num_heads, v_head_size]``, filled.
            lse: ``[num_remote_rows, num_heads]`` fp32, filled; to be given where the
                plan needs a merge with local parts.

        Raises:
            MemoryNodeError: As `collect`.
        """
        if self.loss is None:
            try:
                self._receive_remote(step, layer, output, lse)
            except MemoryNodeError as error:
                self._lose(error)
        if self.loss is not None:
            self._raise_if_lost()
            output.zero_()
            if lse is not None:
                lse.zero_()

    def rows_buffer(self, step: SentStep, num_bytes: int) -> torch.Tensor | None:
        """Device memory for a layer's rows ``q | k | v``, one per token.

        The buffer is to be complete, and nothing else sent, before `post_rows`.

        Args:
            step: Result of ``begin_step``.
            num_bytes: Of all rows.

        Returns:
            uint8 ``[num_bytes]``; None where rows must pass through the host.

        Raises:
            MemoryNodeError: The node is gone.
        """
        if self.loss is not None or not self._is_plain(step, step.remote_rows):
            return None
        (lane,) = self._lanes[step.micro_batch]
        try:
            return lane.rows_buffer(num_bytes)
        except MemoryNodeError as error:
            self._lose(error)
            return None

    def post_rows(self, step: SentStep, layer: int, num_bytes: int) -> None:
        """Send the layer whose rows are in the `rows_buffer`.

        Raises:
            MemoryNodeError: The node is gone.
        """
        self._times.num_layer_calls += 1
        (lane,) = self._lanes[step.micro_batch]
        started = time.perf_counter()
        try:
            lane.client.post_rows(step.number, step.micro_batch, layer, num_bytes)
        except MemoryNodeError as error:
            self._lose(error)
        self._times.send_s += time.perf_counter() - started

    def collect_rows(
        self,
        step: SentStep,
        layer: int,
        num_bytes: int,
        use: Callable[[torch.Tensor], Callable[[], None]],
    ) -> bool:
        """Wait for the output of a layer that `post_rows` sent.

        Args:
            step: As posted.
            layer: As posted.
            num_bytes: Of the output.
            use: Enqueues what reads the output, uint8 ``[num_bytes]`` of device memory;
                returns what waits for it.

        Returns:
            False where the node was lost.

        Raises:
            MemoryNodeError: As `collect`.
        """
        (lane,) = self._lanes[step.micro_batch]
        started = time.perf_counter()
        if self.loss is None:
            try:
                lane.client.keep_rows(use(lane.receive_rows(layer, num_bytes)))
            except MemoryNodeError as error:
                self._lose(error)
        self._times.wait_s += time.perf_counter() - started
        return self.loss is None

    @property
    def wait_s(self) -> float:
        """Seconds of waiting for nodes since the group was made."""
        return self._times.wait_s

    def times(self) -> dict[str, float]:
        """Sums since the group was made."""
        return asdict(self._times)

    def close(self) -> None:
        """End all data channels."""
        for client in self._clients:
            client.close()
        error: BaseException | None = self.loss
        while error is not None:
            # Its frames refer to this group: what is shared with a node would stay
            # mapped until a garbage collection.
            error.__traceback__ = None
            error = error.__cause__ or error.__context__

    def _lose(self, error: MemoryNodeError) -> None:
        self.loss = error
        self._raise_if_lost()

    def _raise_if_lost(self) -> None:
        if self.loss is not None and not self._tolerate_loss:
            raise self.loss

    def _post_step(self, step: SentStep) -> None:
        lanes = self._lanes[step.micro_batch]
        for lane, part in zip(lanes, step.plan.nodes, strict=True):
            lane.begin_step(step.number, step.micro_batch, part, self._token_s)

    def _post_parts(
        self,
        step: SentStep,
        layer: int,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        flags = _WANT_LSE if step.plan.needs_merge else 0
        number, micro_batch, times = step.number, step.micro_batch, self._times
        for lane in self._lanes[micro_batch]:
            started = time.perf_counter()
            payload, layout = lane.pack(*qkv)
            packed = time.perf_counter()
            lane.post(number, micro_batch, layer, flags | layout, payload)
            times.pack_s += packed - started
            times.send_s += time.perf_counter() - packed

    def _lane(self, node: int) -> NodeExchange:
        client, layer = self._clients[node], self._geometry.layers[0]
        num_nodes = len(self._clients)
        if self._partition.kind == "blocks" or num_nodes == 1:
            return NodeExchange(client, slice(0, layer.num_query_heads), None)
        query_heads = _share(layer.num_query_heads, node, num_nodes)
        return NodeExchange(
            client, query_heads, _share(layer.num_kv_heads, node, num_nodes)
        )

    def _receive(
        self,
        step: SentStep,
        layer: int,
        output: torch.Tensor,
        local_lse: torch.Tensor | None,
    ) -> None:
        rows = step.remote_rows
        if self._is_plain(step, rows) and output.is_contiguous():
            self._receive_into(step, layer, output)
            return
        self._receive_parts(step, layer, output, rows)
        started = time.perf_counter()
        if step.partials is not None:
            step.partials.merge_into(output, rows, local_lse)
        self._times.merge_s += time.perf_counter() - started

    def _receive_remote(
        self,
        step: SentStep,
        layer: int,
        output: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """As `_receive`, but ``output`` has a row per remote row."""
        if self._is_plain(step, None) and output.is_contiguous():
            self._receive_into(step, layer, output)
            return
        self._receive_parts(step, layer, output, None)
        started = time.perf_counter()
        if step.partials is not None:
            step.partials.merge_into(output, None, None)
            if lse is not None:
                torch.logsumexp(step.partials.lse, dim=0, out=lse)
        self._times.merge_s += time.perf_counter() - started

    def _is_plain(self, step: SentStep, rows: torch.Tensor | None) -> bool:
        """Whether one reply is the whole output."""
        return len(self._clients) == 1 and rows is None and not step.plan.needs_merge

    def _receive_into(self, step: SentStep, layer: int, output: torch.Tensor) -> None:
        (lane,) = self._lanes[step.micro_batch]
        started = time.perf_counter()
        lane.receive_into(layer, bytes_at(output.data_ptr(), output.nbytes))
        self._times.wait_s += time.perf_counter() - started

    def _receive_parts(
        self,
        step: SentStep,
        layer: int,
        output: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        started = time.perf_counter()
        is_merged, size = step.plan.needs_merge, output.shape[2]
        for node, lane in enumerate(self._lanes[step.micro_batch]):
            if not lane.receive(layer, size, output.dtype, with_lse=is_merged):
                continue
            if is_merged:
                self._place_part(step, node, lane, output, rows)
            elif rows is None:
                output[:, lane.heads] = lane.out
            else:
                output[:, lane.heads].index_copy_(0, rows, lane.out)
        self._times.wait_s += time.perf_counter() - started

    def _place_part(
        self,
        step: SentStep,
        node: int,
        lane: NodeExchange,
        output: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        if step.partials is None:
            step.partials = PartialOutputs(
                len(self._clients) if self._partition.kind == "blocks" else 1,
                output.shape[0] if rows is None else rows.shape[0],
                output.shape[1],
                output.shape[2],
                output.dtype,
            )
        part = node if self._partition.kind == "blocks" else 0
        out, lse = step.partials.out[part], step.partials.lse[part]
        if lane.positions is None:
            out[:, lane.heads], lse[:, lane.heads] = lane.out, lane.lse
        else:
            out.index_copy_(0, lane.positions, lane.out)
            lse.index_copy_(0, lane.positions, lane.lse)


def _share(num_heads: int, node: int, num_nodes: int) -> slice:
    count = num_heads // num_nodes
    return slice(node * count, (node + 1) * count)


def _slowest_token_s(geometry: SessionGeometry) -> float:
    """Seconds for the K and V of one token in one layer, on a node that crawls."""
    row = max(
        layer.num_kv_heads * (layer.head_size + layer.v_head_size)
        for layer in geometry.layers
    )
    return row * 4 / _SLOWEST_BYTES_PER_S
