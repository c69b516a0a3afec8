# SPDX-License-Identifier: Apache-2.0
"""Attention of prefill chunks by the compiled kernels of the memory nodes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_attn_offload.attention.chunk_rows import BLOCK_SIZE, ChunkRows
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.client.step_partition import Prefill
from vllm_attn_offload.native.attention import CpuCache, CpuKernelLibrary
from vllm_attn_offload.native.kernel_inputs import DTYPES, AttendInput, StoreInput

#: More than any step has; memory is taken for those that it has.
_MAX_BLOCKS = 1 << 24


class _Kind(NamedTuple):
    """What layers with one plan have in common."""

    num_query_heads: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    dtype: str
    sliding_window: int


class NativePrefill:
    """Attends chunks over their own rows, in blocks that the next layer overwrites.

    Args:
        library: The built library.
        num_threads: Threads that work on a layer, that of the caller included.
        cpu_ids: One CPU per thread, that of the calling one first; None: any.

    Raises:
        OSError: The host starts no more threads.
    """

    def __init__(
        self,
        library: CpuKernelLibrary,
        num_threads: int,
        cpu_ids: Sequence[int] | None = None,
    ) -> None:
        self._library = library
        self._threads = library.create_pool(num_threads, cpu_ids)
        weakref.finalize(self, library.destroy_pool, self._threads).atexit = False
        self._plans: dict[_Kind, _KindPlan] = {}
        self._rows = ChunkRows((), 1)
        self._blocks = torch.empty(0, dtype=torch.uint8)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        prefills: tuple[Prefill, ...],
        attention: LayerAttention,
    ) -> torch.Tensor:
        """Do what `cpu_prefill.attend_locally` does.

        Args:
            query: ``[num_tokens, num_heads, head_size]``.
            key: ``[num_tokens, num_kv_heads, head_size]``, in units of its scale.
            value: ``[num_tokens, num_kv_heads, v_head_size]``, likewise.
            output: ``[num_tokens, num_heads, v_head_size]``, contiguous.
            prefills: Which rows belong together; planned once while they are equal.
            attention: Attributes of the layer; sinks do not enter here.

        Returns:
            ``[num_tokens, num_heads]`` fp32 natural log-sum-exp; -inf in other rows.

        Raises:
            KeyError: The kernels do not support the dtype.
            ValueError: They do not support the head sizes.
            MemoryError: No memory for the plan.
        """
        query, key, value = map(_with_whole_tokens, (query, key, value))
        plan = self._plan(query, key, value, attention.sliding_window, prefills)
        blocks = self._blocks_of(plan)
        store = StoreInput(
            cache=blocks,
            key=key.data_ptr(),
            value=value.data_ptr(),
            slot_mapping=self._rows.slots.ctypes.data,
            key_stride=_stride_bytes(key),
            value_stride=_stride_bytes(value),
            num_tokens=self._rows.num_tokens,
            source_dtype=DTYPES[_name(key.dtype)],
        )
        self._library.store(self._threads, plan.cache, store)
        lse = torch.empty(query.shape[:2], dtype=torch.float32)
        slopes = attention.alibi_slopes
        call = AttendInput(
            cache=blocks,
            query=query.data_ptr(),
            out=output.data_ptr(),
            lse=lse.data_ptr(),
            alibi_slopes=None if slopes is None else slopes.data_ptr(),
            query_stride=_stride_bytes(query),
            out_stride=_stride_bytes(output),
            softmax_scale=attention.softmax_scale,
            soft_cap=attention.soft_cap,
            query_dtype=DTYPES[_name(query.dtype)],
            out_dtype=DTYPES[_name(output.dtype)],
            k_scale=attention.k_scale,
            v_scale=attention.v_scale,
        )
        self._library.attend(self._threads, plan.address, call)
        return lse

    def _plan(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sliding_window: int,
        prefills: tuple[Prefill, ...],
    ) -> _KindPlan:
        """Plan the step for layers like this one, unless one of them has."""
        num_tokens = query.shape[0]
        rows = self._rows
        if rows.prefills != prefills or rows.num_tokens != num_tokens:
            rows = self._rows = ChunkRows(prefills, num_tokens)
        kind = _Kind(
            num_query_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_size=query.shape[2],
            v_head_size=value.shape[2],
            dtype=_name(key.dtype),
            sliding_window=sliding_window,
        )
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = _KindPlan(self._library, kind)
        plan.fill(self._threads, rows)
        return plan

    def _blocks_of(self, plan: _KindPlan) -> int:
        """Address of memory for the step's blocks, aligned as torch aligns it."""
        num_bytes = self._rows.num_blocks * plan.cache.block_bytes
        if self._blocks.shape[0] < num_bytes:
            self._blocks = torch.empty(num_bytes, dtype=torch.uint8)
        return self._blocks.data_ptr()


class _KindPlan:
    """Plan of a step for one kind of layers."""

    def __init__(self, library: CpuKernelLibrary, kind: _Kind) -> None:
        self._library, self._kind = library, kind
        self.cache: CpuCache = library.create_cache(
            num_blocks=_MAX_BLOCKS,
            block_size=BLOCK_SIZE,
            num_kv_heads=kind.num_kv_heads,
            head_size=kind.head_size,
            v_head_size=kind.v_head_size,
            dtype=kind.dtype,
        )
        self.address = library.create_plan(self.cache)
        self._rows: ChunkRows | None = None
        # In this order: a plan goes before its cache.
        weakref.finalize(self, library.destroy_cache, self.cache).atexit = False
        weakref.finalize(self, library.destroy_plan, self.address).atexit = False

    def fill(self, threads: int, rows: ChunkRows) -> None:
        if self._rows is rows:
            return
        kind = self._kind
        call = rows.plan_input(kind.num_query_heads, kind.sliding_window)
        self._library.plan_step(threads, self.address, call)
        self._rows = rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stride_bytes(rows: torch.Tensor) -> int:
    return rows.stride(0) * rows.itemsize


def _with_whole_tokens(rows: torch.Tensor) -> torch.Tensor:
    """Rows whose heads lie side by side; copied where they do not."""
    if rows.stride(2) == 1 and rows.stride(1) == rows.shape[2]:
        return rows
    return rows.contiguous()
