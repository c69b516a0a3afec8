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
    LayerCall,
    LoopAttention,
)
from vllm_attn_offload.memory_node.decode_attention.cpp_layer_kind import (
    CppLayerKind,
    create_cache,
)
from vllm_attn_offload.memory_node.decode_attention.cpp_step_plan import CppStepPlan
from vllm_attn_offload.memory_node.decode_attention.cpp_threads import CppThreads
from vllm_attn_offload.native.attention import CpuKernelLibrary
from vllm_attn_offload.native.kernel_inputs import DTYPES
from vllm_attn_offload.native.layer_loop import ServedLayer
from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.layer import TokenLayout
from vllm_attn_offload.protocol.step import StepMetadata

_SLOT_BYTES = 8
#: Rows, query heads, KV heads, blocks, their stride, and the window, of alike layers.
_KindKey = tuple[TokenLayout, int, int, int, int, int]


class CppDecodeAttention(LoopAttention["_Pool", CppStepPlan]):
    """The kernels of the C++ library, on threads that all sessions share.

    Args:
        library: The built library.
        cpu_ids: CPUs of the node, a thread on each.
    """

    def __init__(self, library: CpuKernelLibrary, cpu_ids: Sequence[int]) -> None:
        self.isa = library.isa_names[0]
        self.name = f"cpp ({self.isa})"
        self._library = library
        self._threads = CppThreads(library, cpu_ids)
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
            cache = create_cache(self._library, layer, 1, block_size, dtype)
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
            group=layer.group,
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
        previous: CppStepPlan | None,
        *,
        on_half: bool = False,
    ) -> CppStepPlan:
        plan = previous
        if plan is None:
            session = self._sessions.get(id(geometry))
            if session is None:
                raise ConnectionResetError("the session was closed")
            plan = session.create_plan(group)
        try:
            plan.fill(self._threads.of_step(on_half=on_half), step)
        except ValueError as error:
            raise ProtocolError(f"a step that cannot be planned: {error}") from error
        return plan

    def store(
        self, pool: _Pool, plan: CppStepPlan, call: LayerCall, first: int, last: int
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
        self._library.store(plan.threads, calls.cache, store)

    def attend(
        self, pool: _Pool, plan: CppStepPlan, call: LayerCall, slice_s: float = 0.0
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
            plan.threads, calls.plan, attend, int(slice_s * 1e6)
        )

    def served_layer(self, pool: _Pool) -> ServedLayer:
        kind = pool.session.kinds[pool.group][pool.kind]
        return ServedLayer(
            cache=kind.cache.handle,
            blocks=pool.address,
            alibi_slopes=pool.slopes_address,
            kind=pool.kind,
            dtype=DTYPES[kind.dtype],
            softmax_scale=pool.softmax_scale,
            soft_cap=pool.soft_cap,
            k_scale=pool.k_scale,
            v_scale=pool.v_scale,
        )

    def served_plan(self, plan: CppStepPlan) -> tuple[int, int, int]:
        return addressof(plan.plans), plan.slots_address, plan.threads


@dataclass(frozen=True, slots=True)
class _Pool:
    """One layer's blocks; ``kind`` counts within the layer's group."""

    session: _SessionKinds
    group: int
    kind: int
    address: int
    softmax_scale: float
    soft_cap: float
    k_scale: float
    v_scale: float
    slopes: npt.NDArray[np.float32]
    slopes_address: int | None


class _SessionKinds:
    """Kinds of layers that one session's pools share; ends with the last of them."""

    def __init__(self, library: CpuKernelLibrary, geometry: SessionGeometry) -> None:
        self._library = library
        self._geometry = geometry
        self._kinds: list[dict[_KindKey, CppLayerKind]] = [{} for _ in geometry.groups]

    def add_kind(self, layer: LayerGeometry, num_blocks: int, block_stride: int) -> int:
        """Index of the layer's kind in its group."""
        kinds = self._kinds[layer.group]
        heads = (layer.num_query_heads, layer.num_kv_heads)
        blocks = (num_blocks, block_stride)
        key = (TokenLayout.of(layer), *heads, *blocks, layer.sliding_window)
        if key not in kinds:
            block_size = self._geometry.groups[layer.group].block_size
            cache = create_cache(
                self._library,
                layer,
                num_blocks,
                block_size,
                self._geometry.block_dtype,
                block_stride,
            )
            kinds[key] = CppLayerKind(self._library, layer, cache, self._geometry.dtype)
        return list(kinds).index(key)

    @property
    def kinds(self) -> list[list[CppLayerKind]]:
        """Kinds of each group's layers, by their index."""
        return [list(kinds.values()) for kinds in self._kinds]

    def create_plan(self, group: int) -> CppStepPlan:
        """An empty plan of the group's layers."""
        return CppStepPlan(self._library, list(self._kinds[group].values()))
