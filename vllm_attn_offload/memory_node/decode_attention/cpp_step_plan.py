# SPDX-License-Identifier: Apache-2.0
"""One step in C objects that later steps reuse; per layer only pointers change."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from ctypes import c_void_p

import numpy as np

from vllm_attn_offload.memory_node.decode_attention.cpp_layer_kind import CppLayerKind
from vllm_attn_offload.native.attention import CpuKernelLibrary
from vllm_attn_offload.native.kernel_inputs import (
    DTYPES,
    AttendInput,
    PlanInput,
    StoreInput,
)
from vllm_attn_offload.protocol.layer import DTYPE_BYTES
from vllm_attn_offload.protocol.step import StepMetadata


class CppStepPlan:
    """A step of one KV cache group, planned for each kind of its layers.

    Args:
        library: The built library.
        kinds: Kinds of the group's layers.

    Attributes:
        kinds: A plan and the arguments of calls for each of them.
        plans: The plans again, as C code takes them.
        slots_address: Of the step's int64 slots.
        threads: Address of the pool of threads that computes the step.
    """

    slots_address: int
    threads: int

    def __init__(
        self, library: CpuKernelLibrary, kinds: Sequence[CppLayerKind]
    ) -> None:
        self._library = library
        self._slots = np.empty(0, np.int64)
        self._input = PlanInput()
        self.kinds = tuple(_KindCalls(library, kind) for kind in kinds)
        self.plans = (c_void_p * len(self.kinds))(*(each.plan for each in self.kinds))

    def fill(self, threads: int, step: StepMetadata) -> None:
        """Plan a step, whose arrays may change afterwards.

        Raises:
            ValueError: The lengths or blocks of the step contradict the cache.
        """
        self.threads = threads
        if self._slots.shape[0] < step.num_tokens:
            self._slots = np.empty(step.num_tokens, np.int64)
        self._slots[: step.num_tokens] = step.slot_mapping
        call, width = self._input, step.block_table.shape[1]
        call.query_start_loc = step.query_start_loc.ctypes.data
        call.seq_lens = step.seq_lens.ctypes.data
        call.query_positions = step.query_positions.ctypes.data
        call.block_table = step.block_table.ctypes.data
        call.first_block = step.first_block.ctypes.data
        indices = step.block_indices
        call.block_indices = None if indices is None else indices.ctypes.data
        call.num_seqs, call.max_blocks, call.table_stride = step.num_reqs, width, width
        for calls in self.kinds:
            call.num_query_heads = calls.kind.num_query_heads
            call.sliding_window = calls.kind.sliding_window
            self._library.plan_step(threads, calls.plan, call)
        self.slots_address = self._slots.ctypes.data


class _KindCalls:
    """The C plan of one step for one kind of layers, and the arguments of its calls."""

    def __init__(self, library: CpuKernelLibrary, kind: CppLayerKind) -> None:
        item_bytes, dtype = DTYPE_BYTES[kind.dtype], DTYPES[kind.dtype]
        # Keeps the cache geometry alive, which the plan refers to.
        self.kind = kind
        self.cache = kind.cache
        self.plan = library.create_plan(kind.cache)
        self.store = StoreInput(source_dtype=dtype)
        self.attend = AttendInput(
            out_stride=kind.rows.out * item_bytes,
            query_dtype=dtype,
            out_dtype=dtype,
        )
        weakref.finalize(self, library.destroy_plan, self.plan).atexit = False
