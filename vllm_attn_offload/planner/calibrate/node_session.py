# SPDX-License-Identifier: Apache-2.0
"""Layers of a model on real memory nodes, exchanged as an engine does it."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.partition import (
    Partition,
    choose_partition,
    pool_blocks,
    shard_geometry,
)
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.layer import DTYPE_BYTES
from vllm_attn_offload.protocol.messages import (
    AttachSession,
    OpenSession,
    ReserveCapacity,
    Shard,
)
from vllm_attn_offload.protocol.step import StepMetadata
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

TIMEOUT_S = 30.0
FILL_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one layer: its exchange, and the slowest node's work within.

    Medians over steps of a step's mean; work is storing and attending.
    """

    exchange_s: float
    attend_s: float


class NodeSession:
    """A session per memory node, with a KV pool that is filled.

    Untouched pool memory would be one page of zeros, and read at cache speed.

    Args:
        addresses: Running memory nodes.
        geometry: Layers, all alike, in one KV cache group.
        num_tokens: Tokens that the pool holds.
        max_num_reqs: Largest batch.
        credentials: Token and certificates, for both sides.

    Raises:
        MemoryNodeError: A node is gone, or refuses.
        ValueError: The nodes hold fewer tokens.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        geometry: SessionGeometry,
        num_tokens: int,
        max_num_reqs: int,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self._credentials = credentials
        self.geometry = geometry
        self._block_size = geometry.groups[0].block_size
        self._engine = f"calibrate-{uuid.uuid4().hex[:8]}"
        self._num_blocks = -(-num_tokens // self._block_size)
        self._max_num_reqs = max_num_reqs
        kind, _ = choose_partition("auto", geometry, len(addresses))
        self._shard = shard_geometry(geometry, kind, 0, len(addresses))
        with contextlib.ExitStack() as stack:
            self._controls: list[ControlClient] = []
            for address in addresses:
                control = ControlClient(address, TIMEOUT_S, credentials)
                self._controls.append(control)
                stack.callback(control.close)
            clients, blocks = [], []
            for index in range(len(addresses)):
                client, num_blocks = self._open(index)
                stack.callback(client.close)
                clients.append(client)
                blocks.append(num_blocks)
            partition = Partition(kind, tuple(blocks))
            have = pool_blocks(kind, partition.blocks_per_node)
            if have < self._num_blocks:
                raise ValueError(
                    f"The memory nodes hold {have * self._block_size:,} tokens of this "
                    f"model. Calibration needs {num_tokens:,}. Start them with a "
                    "larger --kv-cache-gib, or calibrate with --quick."
                )
            self._nodes = RemoteAttention(clients, partition, geometry)
            self._fill()
            self._stack = stack.pop_all()

    @property
    def capacity_bytes(self) -> int:
        """KV budget of the smallest node."""
        return min(control.info.kv_bytes_total for control in self._controls)

    @property
    def devices(self) -> list[str]:
        """Device and kernel of every node."""
        return [f"{c.info.device}, {c.info.attention_kernel}" for c in self._controls]

    def measure(
        self, batch: int, context: int, steps: int, between: Callable[[], object]
    ) -> LayerTime:
        """Decode `steps` steps of `batch` requests with `context` tokens each.

        Args:
            between: Called before every exchange, as an engine computes there: the
                nodes wait, and caches hold other things when q, k, v arrive.

        Raises:
            MemoryNodeError: A node is gone, or refuses.
        """
        qkv, output = self._rows(batch)
        step_data = self._decode_step(batch, context)
        num_layers = len(self.geometry.layers)
        exchanges, busy = [], []
        for number in range(steps + 1):
            before = self._busy_s()
            step = self._nodes.begin_step(step_data)
            spent_s = 0.0
            for layer in range(num_layers):
                between()
                started = time.perf_counter()
                self._nodes.exchange(step, layer, *qkv, output)
                spent_s += time.perf_counter() - started
            if number:  # the first step plans, allocates and wakes
                exchanges.append(spent_s / num_layers)
                pairs = zip(before, self._busy_s(), strict=True)
                busy.append(max(b - a for a, b in pairs) / num_layers)
        exchange_s = median(exchanges)
        return LayerTime(exchange_s, min(median(busy), exchange_s))

    def close(self) -> None:
        """Free what the nodes hold."""
        self._stack.close()

    def _open(self, index: int) -> tuple[NodeClient, int]:
        control = self._controls[index]
        reserved = control.reserve(
            ReserveCapacity(
                self._engine,
                Shard(node_index=index, num_nodes=len(self._controls)),
                self._shard,
                self._bytes_to_reserve(control),
            )
        )
        opened = control.open_session(
            OpenSession(
                reservation=reserved.reservation,
                generation=0,
                num_blocks=reserved.num_blocks,
                max_num_tokens=FILL_TOKENS,
                max_num_reqs=self._max_num_reqs,
                max_blocks_per_req=self._num_blocks,
            )
        )
        attach = AttachSession(
            opened.session, opened.attach_token, 0, self._shard.digest(), 0
        )
        client = NodeClient(control.address, attach, TIMEOUT_S, self._credentials)
        return client, reserved.num_blocks

    def _bytes_to_reserve(self, control: ControlClient) -> int:
        """The pool, with a quarter more for a layout that pads its blocks."""
        layer = self._shard.layers[0]
        row = layer.num_kv_heads * (layer.head_size + layer.v_head_size)
        row *= DTYPE_BYTES[self.geometry.dtype]
        tokens = (self._num_blocks + 1) * self._block_size
        wanted = int(1.25 * tokens * row * len(self._shard.layers))
        return max(min(wanted, control.info.kv_bytes_free), 1)

    def _rows(
        self, batch: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """q, k and v as views of fused rows, and room for the output."""
        layer = self.geometry.layers[0]
        dtype = getattr(torch, self.geometry.dtype)
        q, k = layer.num_query_heads * layer.head_size, layer.num_kv_heads
        sizes = [q, k * layer.head_size, k * layer.v_head_size]
        parts = torch.randn(batch, sum(sizes)).to(dtype).split(sizes, 1)
        query, key, value = (
            part.unflatten(1, (heads, -1))
            for part, heads in zip(parts, (layer.num_query_heads, k, k), strict=True)
        )
        shape = batch, layer.num_query_heads, layer.v_head_size
        return (query, key, value), torch.empty(shape, dtype=dtype)

    def _decode_step(self, batch: int, context: int) -> StepMetadata:
        """Requests with blocks of their own; the last token is the new one."""
        width = -(-context // self._block_size)
        table = np.arange(batch * width, dtype=np.int32).reshape(batch, width)
        last = (context - 1) % self._block_size
        return StepMetadata.whole(
            query_start_loc=np.arange(batch + 1, dtype=np.int32),
            seq_lens=np.full(batch, context, np.int32),
            slot_mapping=table[:, -1].astype(np.int64) * self._block_size + last,
            block_table=table,
        )

    def _fill(self) -> None:
        """Store random k and v everywhere, as chunks of prefill."""
        num_tokens = self._num_blocks * self._block_size
        for begin in range(0, num_tokens, FILL_TOKENS):
            count = min(FILL_TOKENS, num_tokens - begin)
            first = begin // self._block_size
            width = -(-count // self._block_size)
            qkv, output = self._rows(count)
            step = self._nodes.begin_step(
                StepMetadata.whole(
                    query_start_loc=np.array([0, count], np.int32),
                    seq_lens=np.array([count], np.int32),
                    slot_mapping=np.arange(begin, begin + count, dtype=np.int64),
                    block_table=np.arange(first, first + width, dtype=np.int32)[None],
                )
            )
            for layer in range(len(self.geometry.layers)):
                self._nodes.post_layer(step, layer, *qkv)
                # Nothing is attended: the call waits for acknowledgements.
                self._nodes.collect(step, layer, output[:0])

    def _busy_s(self) -> list[float]:
        """Seconds that each node has spent storing and attending for us."""
        return [
            sum(
                session.counters.store_s + session.counters.attend_s
                for session in control.stats().sessions
                if session.engine == self._engine
            )
            for control in self._controls
        ]
