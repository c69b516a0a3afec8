# SPDX-License-Identifier: Apache-2.0
"""The interface between a session and the kernel that attends for it."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_attn_offload.memory_node.step import AttentionStep
from vllm_attn_offload.protocol import LayerGeometry, SessionGeometry

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class BlockLayout(ABC):
    """How a kernel lays out a block; private to the node."""

    @abstractmethod
    def block_bytes(self, layer: LayerGeometry, block_size: int, dtype: str) -> int:
        """Bytes of K and V of one block of ``layer``."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where q, k and v lie in a row of a LAYER payload, in elements.

    A row is one token: ``num_query_heads * head_size`` of q, then k, then v, as in
    the output of a fused QKV projection.
    """

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
    def store(self, pool: object, plan: object, qkv: memoryview) -> None:
        """Write the step's new k, v into the blocks.

        Args:
            pool: Result of ``bind``.
            plan: Result of ``plan``.
            qkv: LAYER payload, ``[num_tokens, row width]`` in the session's dtype.
        """

    @abstractmethod
    def attend(
        self,
        pool: object,
        plan: object,
        qkv: memoryview,
        out: memoryview,
        lse: memoryview | None,
    ) -> None:
        """Causal attention of the step's queries over their requests' blocks.

        Args:
            pool: Result of ``bind``.
            plan: Result of ``plan``.
            qkv: LAYER payload, ``[num_tokens, row width]`` in the session's dtype.
            out: ``[num_tokens, num_query_heads * v_head_size]``, session's dtype.
            lse: ``[num_tokens, num_query_heads]`` float32, natural logarithm; -inf
                where a query sees no token.
        """

    def finish(self, plan: object, out: memoryview, lse: memoryview | None) -> None:
        """Wait for what ``attend`` began; called without the node's lock.

        Does nothing where ``attend`` returns with its results, as on a CPU.
        """
