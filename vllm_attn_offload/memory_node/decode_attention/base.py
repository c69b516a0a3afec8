# SPDX-License-Identifier: Apache-2.0
"""The interface between a session and the kernel that attends for it."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from vllm_attn_offload.protocol.layer import PayloadLayout
from vllm_attn_offload.protocol.messages import LayerGeometry, SessionGeometry
from vllm_attn_offload.protocol.step import StepMetadata
from vllm_attn_offload.transport.shared_device import SharedDevice

if TYPE_CHECKING:
    import torch


class BlockLayout(ABC):
    """How a kernel lays out a block; private to the node."""

    @abstractmethod
    def block_bytes(self, layer: LayerGeometry, block_size: int, dtype: str) -> int:
        """Bytes of K and V of one block of ``layer``."""


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
    def plan(self, group: int, geometry: SessionGeometry, step: StepMetadata) -> object:
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
