# SPDX-License-Identifier: Apache-2.0
"""Decode attention by the compiled CPU kernels (``native/csrc``).

A step is planned once, into C objects that later steps reuse; per layer only pointers
change.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.memory_node.capacity import CapacityError
from vllm_attn_offload.memory_node.decode_attention.base import (
    DecodeAttention,
    LayerCall,
)
from vllm_attn_offload.native.attention import (
    CpuCache,
    CpuKernelLibrary,
)
from vllm_attn_offload.native.kernel_inputs import (
    DTYPES,
    AttendInput,
    PlanInput,
    StoreInput,
)
from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.layer import DTYPE_BYTES, TokenLayout
from vllm_attn_offload.protocol.step import StepMetadata

_SPIN_US = 50
_SLOT_BYTES = 8
#: Rows, query heads, KV heads, blocks, their stride, and the window, of alike layers.
_KindKey = tuple[TokenLayout, int, int, int, int, int]


class CppDecodeAttention(DecodeAttention["_Pool", "_KernelPlan"]):
    """The kernels of the C++ library, on threads that all sessions share.

    Args:
        library: The built library.
        cpu_ids: CPUs of the node, a thread on each: that of the calling session on the
            first, pinned ones on the others.
    """

    def __init__(self, library: CpuKernelLibrary, cpu_ids: Sequence[int]) -> None:
        self.isa = library.isa_names[0]
        self.name = f"cpp ({self.isa})"
        self._library = library
        spin_us = _SPIN_US if len(cpu_ids) > 1 else 0
        self._threads = library.create_pool(len(cpu_ids), cpu_ids, spin_us)
        # By the identity of its geometry, which the value keeps alive.
        self._sessions: weakref.WeakValueDictionary[int, _SessionKinds] = (
            weakref.WeakValueDictionary()
        )

    def block_bytes(self, layer: LayerGeometry, block_size: int, dtype: str) -> int:
        """Bytes of K and V of one block of ``layer``, padding included.

        Raises:
            CapacityError: The kernels do not support the layer's head sizes.
        """
        try:
            cache = _create_cache(self._library, layer, 1, block_size, dtype)
        except ValueError as error:
            raise CapacityError(
                f"no block of layer {layer.name} can be held: {error} Or start the "
                "node with --attention-kernel torch."
            ) from error
        self._library.destroy_cache(cache)
        return cache.block_bytes

    def bind(
        self,
        geometry: SessionGeometry,
        layer: LayerGeometry,
        region: mmap.mmap,
        block_stride: int,
    ) -> _Pool:
        session = self._sessions.get(id(geometry))
        if session is None:
            session = _SessionKinds(self._library, geometry)
            self._sessions[id(geometry)] = session
        num_blocks = len(region) // block_stride
        slopes = np.array(layer.alibi_slopes, np.float32)
        return _Pool(
            session=session,
            kind=session.add_kind(layer, num_blocks, block_stride),
            # The view ends at once: a region with views cannot be unmapped.
            address=addressof(c_char.from_buffer(region)),
            softmax_scale=layer.softmax_scale,
            soft_cap=layer.soft_cap,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            slopes=slopes,
            slopes_address=slopes.ctypes.data if slopes.size else None,
        )

    def plan(
        self,
        group: int,
        geometry: SessionGeometry,
        step: StepMetadata,
        previous: _KernelPlan | None,
    ) -> _KernelPlan:
        plan = previous
        if plan is None:
            session = self._sessions.get(id(geometry))
            if session is None:
                raise ConnectionResetError("the session was closed")
            plan = session.create_plan(group)
        try:
            plan.fill(self._threads, step)
        except ValueError as error:
            raise ProtocolError(f"a step that cannot be planned: {error}") from error
        return plan

    def store(
        self, pool: _Pool, plan: _KernelPlan, call: LayerCall, first: int, last: int
    ) -> None:
        calls, key, value = plan.kinds[pool.kind], call.layout.key, call.layout.value
        address = addressof(c_char.from_buffer(call.payload))
        store = calls.store
        store.cache = pool.address
        store.key = address + key.offset + first * key.stride
        store.value = address + value.offset + first * value.stride
        store.key_stride, store.value_stride = key.stride, value.stride
        store.slot_mapping = plan.slots_address + first * _SLOT_BYTES
        store.num_tokens = last - first
        store.k_scale, store.v_scale = pool.k_scale, pool.v_scale
        self._library.store(self._threads, calls.cache, store)

    def attend(
        self, pool: _Pool, plan: _KernelPlan, call: LayerCall, slice_s: float = 0.0
    ) -> bool:
        calls, query, lse = plan.kinds[pool.kind], call.layout.query, call.lse
        attend = calls.attend
        attend.cache = pool.address
        attend.query = addressof(c_char.from_buffer(call.payload)) + query.offset
        attend.query_stride = query.stride
        attend.out = addressof(c_char.from_buffer(call.out))
        attend.lse = None if lse is None else addressof(c_char.from_buffer(lse))
        attend.softmax_scale, attend.soft_cap = pool.softmax_scale, pool.soft_cap
        attend.k_scale, attend.v_scale = pool.k_scale, pool.v_scale
        attend.alibi_slopes = pool.slopes_address
        return self._library.attend(
            self._threads, calls.plan, attend, int(slice_s * 1e6)
        )


@dataclass(frozen=True, slots=True)
class _Pool:
    """One layer's blocks; ``kind`` counts within the layer's group."""

    session: _SessionKinds
    kind: int
    address: int
    softmax_scale: float
    soft_cap: float
    k_scale: float
    v_scale: float
    slopes: npt.NDArray[np.float32]
    slopes_address: int | None


class _LayerKind:
    """Layers of a group that can share a plan, and their cache geometry.

    ``dtype`` is that of payloads and results; blocks may be of fp8 instead.
    """

    def __init__(
        self,
        library: CpuKernelLibrary,
        layer: LayerGeometry,
        cache: CpuCache,
        dtype: str,
    ) -> None:
        self.rows = TokenLayout.of(layer)
        self.num_query_heads = layer.num_query_heads
        self.sliding_window = layer.sliding_window
        self.dtype = dtype
        self.cache = cache
        weakref.finalize(self, library.destroy_cache, self.cache).atexit = False


class _KindCalls:
    """The C plan of one step for one kind of layers, and the arguments of its calls."""

    def __init__(self, library: CpuKernelLibrary, kind: _LayerKind) -> None:
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


class _KernelPlan:
    """A step of one KV cache group, planned for each kind of its layers.

    ``slots_address`` is that of its int64 slots.
    """

    slots_address: int

    def __init__(self, library: CpuKernelLibrary, kinds: Sequence[_LayerKind]) -> None:
        self._library = library
        self._slots = np.empty(0, np.int64)
        self._input = PlanInput()
        self.kinds = tuple(_KindCalls(library, kind) for kind in kinds)

    def fill(self, threads: int, step: StepMetadata) -> None:
        """Plan a step, whose arrays may change afterwards.

        Raises:
            ValueError: The lengths or blocks of the step contradict the cache.
        """
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


class _SessionKinds:
    """Kinds of layers that one session's pools share; ends with the last of them."""

    def __init__(self, library: CpuKernelLibrary, geometry: SessionGeometry) -> None:
        self._library = library
        self._geometry = geometry
        self._kinds: list[dict[_KindKey, _LayerKind]] = [{} for _ in geometry.groups]

    def add_kind(self, layer: LayerGeometry, num_blocks: int, block_stride: int) -> int:
        """Index of the layer's kind in its group."""
        kinds = self._kinds[layer.group]
        heads = (layer.num_query_heads, layer.num_kv_heads)
        blocks = (num_blocks, block_stride)
        key = (TokenLayout.of(layer), *heads, *blocks, layer.sliding_window)
        if key not in kinds:
            block_size = self._geometry.groups[layer.group].block_size
            cache = _create_cache(
                self._library,
                layer,
                num_blocks,
                block_size,
                self._geometry.block_dtype,
                block_stride,
            )
            kinds[key] = _LayerKind(self._library, layer, cache, self._geometry.dtype)
        return list(kinds).index(key)

    def create_plan(self, group: int) -> _KernelPlan:
        """An empty plan of the group's layers."""
        return _KernelPlan(self._library, list(self._kinds[group].values()))


def _create_cache(
    library: CpuKernelLibrary,
    layer: LayerGeometry,
    num_blocks: int,
    block_size: int,
    dtype: str,
    block_stride: int = 0,
) -> CpuCache:
    return library.create_cache(
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=layer.num_kv_heads,
        head_size=layer.head_size,
        v_head_size=layer.v_head_size,
        dtype=dtype,
        block_stride=block_stride,
    )
