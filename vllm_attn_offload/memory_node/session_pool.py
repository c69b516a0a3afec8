# SPDX-License-Identifier: Apache-2.0
"""The KV pool of one session, which is computed on in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vllm_attn_offload.memory_node.decode_attention.base import (
    DecodeAttention,
    LayerCall,
    LoopAttention,
    SharedRowsAttention,
)
from vllm_attn_offload.memory_node.fair_lock import Turns
from vllm_attn_offload.memory_node.kv_cache import PagedKVCache
from vllm_attn_offload.memory_node.layer_loop import LayerLoop
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.layer import PayloadLayout
from vllm_attn_offload.protocol.session_counters import SessionCounters

if TYPE_CHECKING:
    import torch

#: Longest turn of a session, about: a LAYER that takes longer is attended in slices.
SLICE_S = 0.003
_ABANDONED = "the peer closed the channel in the middle of a layer"


class SessionPool:
    """KV blocks of all layers of a session, and the attention over them.

    No reference to a layer's pool outlives a turn: ``close`` unmaps it next. Every
    method but the constructor and ``close`` raises ConnectionResetError once the pool
    is closed.

    Args:
        geometry: Layers of the session.
        num_blocks: Blocks of every layer.
        attention: The node's kernel.
        turns: Context in which nobody else computes.
        counters: Times are added to it.

    Attributes:
        loop: Computes without the interpreter; None: this kernel cannot.
    """

    loop: LayerLoop | None

    def __init__(
        self,
        geometry: SessionGeometry,
        num_blocks: int,
        attention: DecodeAttention[Any, Any],
        turns: AbstractContextManager[None],
        counters: SessionCounters,
    ) -> None:
        self._attention = attention
        self._turns = turns
        self._counters = counters
        self._cache = PagedKVCache(geometry, num_blocks, attention)
        try:
            self._pools = [
                attention.bind(
                    geometry,
                    layer,
                    self._cache.region(layer),
                    self._cache.block_stride(layer),
                )
                for layer in geometry.layers
            ]
            self.loop = self._layer_loop(geometry)
        except BaseException:
            self._cache.close()
            raise

    @property
    def num_blocks(self) -> int:
        """Blocks of every layer."""
        return self._cache.num_blocks

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return self._cache.num_bytes

    def while_open(self, use: Callable[[], None]) -> None:
        """Call a function in a turn in which the pool is open."""
        with self._turns:
            self._raise_if_closed()
            use()

    def compute(
        self,
        layer: int,
        plan: Any,
        call: LayerCall,
        has_ended: Callable[[], bool],
        *,
        is_begun: bool = False,
    ) -> None:
        """Store and attend, slice by slice, in turn with other engines.

        Args:
            layer: Index of the layer.
            plan: Plan of the step.
            call: The layer's payload and result buffers.
            has_ended: Asked between slices if nobody waits for the result any more.
            is_begun: All rows are stored; the attention goes on.

        Raises:
            ConnectionResetError: The pool was closed, or nobody waits.
        """
        attention = self._attention
        if attention.copies_rows:
            attention.begin(plan, call)
        num_stored, is_done = call.layout.num_tokens if is_begun else 0, False
        while not is_done:
            asked = time.perf_counter()
            with self._turns:
                num_stored, is_done = self._take_turn(
                    layer, plan, call, asked, num_stored
                )
            if not is_done and has_ended():
                raise ConnectionResetError(_ABANDONED)
        if attention.copies_rows and call.layout.num_query_rows:
            started = time.perf_counter()
            attention.finish(plan, call)
            self._counters.attend_s += time.perf_counter() - started

    def compute_rows(
        self,
        attention: SharedRowsAttention[Any, Any],
        layer: int,
        plan: Any,
        rows: torch.Tensor,
        layout: PayloadLayout,
        out: torch.Tensor,
        has_ended: Callable[[], bool],
    ) -> None:
        """Store and attend with rows in device memory, in turn with other engines.

        Args:
            attention: The node's kernel, known to take such rows.
            layer: Index of the layer.
            plan: Plan of the step.
            rows: uint8 ``[num_bytes]``: q, k and v.
            layout: Where they lie in ``rows``.
            out: uint8 ``[num_bytes]``, filled.
            has_ended: As for ``compute``.

        Raises:
            ConnectionResetError: As ``compute``.
        """
        has_begun = False
        while not has_begun:
            asked = time.perf_counter()
            with self._turns:
                self._raise_if_closed()
                started = time.perf_counter()
                has_begun = attention.attend_rows(
                    self._pools[layer], plan, rows, layout, out
                )
            if has_begun:
                attention.finish_rows(plan)
            self._counters.queue_s += started - asked
            self._counters.attend_s += time.perf_counter() - started
            if not has_begun and has_ended():
                raise ConnectionResetError(_ABANDONED)

    def close(self, then: Callable[[], None]) -> None:
        """Free the blocks.

        Args:
            then: Called in the turn after which nobody computes any more.
        """
        with self._turns:
            self._pools.clear()
            if self.loop is not None:
                self.loop.close()
            then()
        # Not in the turn: unmapping 1 GiB takes up to 0.1 s.
        self._cache.close()

    def _take_turn(
        self, layer: int, plan: Any, call: LayerCall, asked: float, num_stored: int
    ) -> tuple[int, bool]:
        """Store the next rows or, once none are left, attend for a slice.

        Returns:
            Rows that are stored, and True in the last turn.
        """
        self._raise_if_closed()
        attention, pool, counters = self._attention, self._pools[layer], self._counters
        layout, started = call.layout, time.perf_counter()
        counters.queue_s += started - asked
        num_tokens = layout.num_tokens
        if num_stored < num_tokens:
            last = num_tokens
            if layout.num_bytes > attention.store_bytes:
                share = num_tokens * attention.store_bytes // layout.num_bytes
                last = min(num_stored + max(share, 1), num_tokens)
            attention.store(pool, plan, call, num_stored, last)
            stored = time.perf_counter()
            counters.store_s += stored - started
            if last < num_tokens:
                return last, False
            started = stored
        if not layout.num_query_rows:
            return num_tokens, True
        is_done = attention.attend(pool, plan, call, SLICE_S)
        counters.attend_s += time.perf_counter() - started
        return num_tokens, is_done

    def _layer_loop(self, geometry: SessionGeometry) -> LayerLoop | None:
        attention, turns = self._attention, self._turns
        if not isinstance(attention, LoopAttention) or not isinstance(turns, Turns):
            return None
        return LayerLoop(attention, geometry, self._pools, turns, SLICE_S)

    def _raise_if_closed(self) -> None:
        if not self._pools:
            raise ConnectionResetError("the session was closed")
