# SPDX-License-Identifier: Apache-2.0
"""The interface between a session and the kernel that attends for it."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vllm_attn_offload.memory_node.step import AttentionStep
from vllm_attn_offload.protocol import LayerGeometry, SessionGeometry
from vllm_attn_offload.transport.shared_device import SharedDevice

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class BlockLayout(ABC):
    """How a kernel lays out a block; private to the node."""

    @abstractmethod
    def block_bytes(self, layer: LayerGeometry, block_size: int, dtype: str) -> int:
        """Bytes of K and V of one block of ``layer``."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Elements of one token's q, k, v and output."""

    q: int
    k: int
    v: int
    out: int

    @classmethod
    def of(cls, layer: LayerGeometry) -> RowLayout:
        """Row layout of a layer."""
        return cls(
            q=layer.num_query_heads * layer.head_size,
            k=layer.num_kv_heads * layer.head_size,
            v=layer.num_kv_heads * layer.v_head_size,
            out=layer.num_query_heads * layer.v_head_size,
        )

    @property
    def width(self) -> int:
        """Elements of q, k and v of one token."""
        return self.q + self.k + self.v


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows inside a LAYER payload: first byte, and bytes from row to row."""

    offset: int
    stride: int


@dataclass(frozen=True, slots=True)
class PayloadLayout:
    """Where q, k and v lie in a LAYER payload.

    Args:
        num_query_rows: Rows of q.
        num_tokens: Rows of k and of v.
        query: ``num_query_heads * head_size`` elements a row.
        key: ``num_kv_heads * head_size`` elements a row.
        value: ``num_kv_heads * v_head_size`` elements a row.
        num_bytes: Of the payload.
    """

    num_query_rows: int
    num_tokens: int
    query: Columns
    key: Columns
    value: Columns
    num_bytes: int

    @classmethod
    def fused(cls, rows: RowLayout, num_tokens: int, item_bytes: int) -> PayloadLayout:
        """One row ``q | k | v`` per token, as a fused QKV projection writes them."""
        q, k, stride = (item_bytes * n for n in (rows.q, rows.k, rows.width))
        columns = (Columns(0, stride), Columns(q, stride), Columns(q + k, stride))
        return cls(num_tokens, num_tokens, *columns, num_tokens * stride)

    @classmethod
    def planar(
        cls, rows: RowLayout, num_query_rows: int, num_tokens: int, item_bytes: int
    ) -> PayloadLayout:
        """All rows of q, then all of k, then all of v."""
        q, k, v = (item_bytes * n for n in (rows.q, rows.k, rows.v))
        key = num_query_rows * q
        value = key + num_tokens * k
        columns = (Columns(0, q), Columns(key, k), Columns(value, v))
        return cls(num_query_rows, num_tokens, *columns, value + num_tokens * v)


class Region(Protocol):
    """Memory of one storage: bytes that no other session shares."""

    def __len__(self) -> int: ...

    def close(self) -> None: ...


class DecodeAttention(BlockLayout):
    """Stores k, v into blocks and attends over them. One instance serves all sessions.

    ``plan`` is called once per step and group; ``store`` and ``attend`` once per layer.
    Calls for different sessions may overlap.
    """

    #: Shown in NodeInfo and in the log.
    name: str

    def allocate(self, num_bytes: int) -> Region:
        """Memory for one storage, all zero, so that it shows no other engine's data.

        The default is an anonymous mapping: untouched blocks cost no memory, the
        operating system hands out zeroed pages, and ``close`` gives them back.
        """
        return mmap.mmap(-1, num_bytes)

    def poison(self, region: Any) -> None:
        """Fill a region with a byte that makes every float NaN."""
        chunk = b"\xff" * (1 << 20)
        region.seek(0)
        while len(region) - region.tell() >= len(chunk):
            region.write(chunk)
        region.write(chunk[: len(region) - region.tell()])

    @abstractmethod
    def bind(
        self, geometry: SessionGeometry, layer: LayerGeometry, region: Any
    ) -> object:
        """Prepare a layer's pool; the result is passed to ``store`` and ``attend``.

        Args:
            geometry: Session.
            layer: One of its layers.
            region: Result of ``allocate`` for the layer's storage.
        """

    @abstractmethod
    def plan(
        self, group: int, geometry: SessionGeometry, step: AttentionStep
    ) -> object:
        """Turn a step into what the kernel needs for every layer of the group."""

    @abstractmethod
    def store(
        self, pool: object, plan: object, payload: memoryview, layout: PayloadLayout
    ) -> None:
        """Write the step's new k, v into the blocks.

        Args:
            pool: Result of ``bind``.
            plan: Result of ``plan``.
            payload: Of a LAYER, in the session's dtype.
            layout: Where q, k and v lie in it.
        """

    @abstractmethod
    def attend(
        self,
        pool: object,
        plan: object,
        payload: memoryview,
        layout: PayloadLayout,
        out: memoryview,
        lse: memoryview | None,
    ) -> None:
        """Attention of the step's queries over ``seq_lens`` tokens of their requests.

        Args:
            pool: Result of ``bind``.
            plan: Result of ``plan``.
            payload: Of a LAYER, in the session's dtype.
            layout: Where q, k and v lie in it.
            out: ``[num_query_rows, num_query_heads * v_head_size]``, session's dtype.
            lse: ``[num_query_rows, num_query_heads]`` float32, natural logarithm; -inf
                where a query sees no token.
        """

    def finish(self, plan: object, out: memoryview, lse: memoryview | None) -> None:
        """Wait for what ``attend`` began; called without the node's lock.

        Does nothing where ``attend`` returns with its results, as on a CPU.
        """


class SharedRowsAttention(DecodeAttention):
    """A kernel that reads rows, and leaves results, where workers can map them.

    Attributes:
        shared_device: What holds them.
    """

    shared_device: SharedDevice

    @abstractmethod
    def attend_rows(
        self,
        pool: object,
        plan: object,
        rows: torch.Tensor,
        layout: PayloadLayout,
        out: torch.Tensor,
    ) -> None:
        """Begin ``store`` and ``attend`` with memory of the device.

        Args:
            pool: Result of ``bind``.
            plan: Result of ``plan``.
            rows: Payload of a LAYER, uint8.
            layout: Where q, k and v lie in it.
            out: As for ``attend``, uint8.
        """

    @abstractmethod
    def finish_rows(self, plan: object) -> None:
        """Wait until rows are read and results complete; without the node's lock."""
