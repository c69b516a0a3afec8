# SPDX-License-Identifier: Apache-2.0
"""The interface between a session and the kernel that attends for it."""

from __future__ import annotations

import contextlib
import mmap
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import msgspec

from vllm_attn_offload.memory_node.kv_arena import KVArena
from vllm_attn_offload.native.layer_loop import ServedLayer
from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.layer import PayloadLayout
from vllm_attn_offload.protocol.step import StepMetadata
from vllm_attn_offload.transport.cuda_memory import SharedDevice

if TYPE_CHECKING:
    import torch

PoolT = TypeVar("PoolT")
PlanT = TypeVar("PlanT")


class BlockLayout(ABC):
    """Block layout of a kernel; private to the node."""

    @abstractmethod
    def block_bytes(self, layer: LayerGeometry, block_size: int, dtype: str) -> int:
        """Bytes of K and V of one block of ``layer``, of elements of ``dtype``."""


class Region(Protocol):
    """Memory of one storage: bytes that no other session shares."""

    def __len__(self) -> int: ...

    def close(self) -> None: ...


class LayerCall(msgspec.Struct, frozen=True, gc=False):
    """Payload and result buffers of one LAYER; a struct, because it is cheap to make.

    Attributes:
        payload: q, k and v in the session's dtype.
        layout: Where q, k and v lie in ``payload``.
        out: ``[num_query_rows, num_query_heads * v_head_size]``, session's dtype.
        lse: ``[num_query_rows, num_query_heads]`` float32, natural logarithm; -inf
            where a query sees no token. None where nobody asked for it.
    """

    payload: memoryview
    layout: PayloadLayout
    out: memoryview
    lse: memoryview | None


class DecodeAttention(BlockLayout, Generic[PoolT, PlanT]):
    """Stores k, v into blocks and attends over them. One instance serves all sessions.

    ``plan`` is called once per step and group, ``store`` and ``attend`` in the turns of
    a layer. Calls for different sessions may overlap. ``PoolT`` holds the blocks of a
    layer, ``PlanT`` (a kernel plan) what the kernel prepared for a step.
    """

    #: Shown in NodeInfo and in the log.
    name: str
    #: Instructions that it was compiled for; empty: it has no such choice.
    isa: str = ""
    #: Rows go to memory of the kernel's own and back, as on a GPU: by ``begin`` and
    #: ``finish``, which take no turn, because only the session waits for them.
    copies_rows = False
    #: Payload whose k and v are stored in one turn; a core takes about 1 ms for 1 MiB.
    store_bytes = 2 << 20
    #: Memory that the node holds from the start; None: sessions bring their own.
    arena: KVArena | None = None

    def allocate(self, num_bytes: int) -> Region:
        """Memory for one storage, all zero, so that it shows no other engine's data.

        The default is an anonymous mapping: untouched blocks cost no memory, the
        operating system hands out zeroed pages, and ``close`` gives them back.
        """
        # Python's default is shared memory, which gets small pages.
        region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            region.madvise(mmap.MADV_HUGEPAGE)
        return region

    def poison(self, region: Any) -> None:
        """Fill a region with a byte that makes every float NaN."""
        chunk = b"\xff" * (1 << 20)
        with memoryview(region) as view:
            for begin in range(0, len(view), len(chunk)):
                end = min(begin + len(chunk), len(view))
                view[begin:end] = chunk[: end - begin]

    @abstractmethod
    def bind(
        self,
        geometry: SessionGeometry,
        layer: LayerGeometry,
        region: Any,
        block_stride: int,
    ) -> PoolT:
        """Prepare a layer's pool; the result is passed to ``store`` and ``attend``.

        Args:
            geometry: Geometry of the session.
            layer: One of its layers.
            region: Result of ``allocate`` for the layer's storage.
            block_stride: Bytes from block to block in ``region``: those of the largest
                layer that shares it. A block of any layer lies within its own.
        """

    @abstractmethod
    def plan(
        self,
        group: int,
        geometry: SessionGeometry,
        step: StepMetadata,
        previous: PlanT | None,
        *,
        on_half: bool = False,
    ) -> PlanT:
        """Turn a step into what the kernel needs for every layer of the group.

        Args:
            group: Index of the KV cache group.
            geometry: Geometry of the session.
            step: The step; its arrays may change afterwards.
            previous: Plan of the step before, of the same micro-batch and group. Its
                layers are done, so its buffers may be used again; it ends here.
            on_half: Leave the first half of the node's CPUs to others, where the
                kernel can: called in the thread that computes the layers.

        Raises:
            ProtocolError: The step contradicts the cache.
        """

    def begin(self, plan: PlanT, call: LayerCall) -> None:
        """Bring a layer's payload to the kernel, where ``copies_rows``."""
        raise NotImplementedError

    @abstractmethod
    def store(
        self, pool: PoolT, plan: PlanT, call: LayerCall, first: int, last: int
    ) -> None:
        """Write rows ``first`` to ``last``, exclusive, of new k, v into the blocks."""

    @abstractmethod
    def attend(
        self, pool: PoolT, plan: PlanT, call: LayerCall, slice_s: float = 0.0
    ) -> bool:
        """Attend with the step's queries over the tokens that they see.

        A token that no row sees is not read: its block may be another request's.

        Args:
            pool: Blocks of the layer.
            plan: Plan of the step; the next ``plan`` abandons an unfinished layer.
            call: The same for every slice of a layer.
            slice_s: Stop after about so many seconds; 0: do not stop.

        Returns:
            True once the layer is finished; after False the next call goes on.
        """

    def finish(self, plan: PlanT, call: LayerCall) -> None:
        """Wait for what ``attend`` began and bring it back, where ``copies_rows``."""
        raise NotImplementedError


class LoopAttention(DecodeAttention[PoolT, PlanT]):
    """A kernel that C code calls (`native/layer_loop.py`)."""

    @abstractmethod
    def served_layer(self, pool: PoolT) -> ServedLayer:
        """What ``store`` and ``attend`` take from a layer's pool, beside its rows."""

    @abstractmethod
    def served_plan(self, plan: PlanT) -> tuple[int, int, int]:
        """Addresses of a plan for each kind of layers, of slots, and of threads."""


class SharedRowsAttention(DecodeAttention[PoolT, PlanT]):
    """A kernel that reads rows, and leaves results, where workers can map them.

    Attributes:
        shared_device: The device that holds them.
    """

    shared_device: SharedDevice

    @abstractmethod
    def attend_rows(
        self,
        pool: PoolT,
        plan: PlanT,
        rows: torch.Tensor,
        layout: PayloadLayout,
        out: torch.Tensor,
    ) -> bool:
        """Begin ``store`` and ``attend`` with memory of the device.

        Args:
            pool: Result of ``bind``.
            plan: Result of ``plan``.
            rows: ``[num_bytes]`` uint8 on the device, payload of a LAYER.
            layout: Where q, k and v lie in it.
            out: ``[num_query_rows * num_query_heads * v_head_size * item_bytes]`` uint8
                on the device.

        Returns:
            True once all of the layer has begun; after False the next call goes on.
        """

    @abstractmethod
    def finish_rows(self, plan: PlanT) -> None:
        """Wait until rows are read and results complete; without the node's lock."""
