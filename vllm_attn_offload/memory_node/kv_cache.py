# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache of one session: memory for its blocks, and how many fit."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from vllm_attn_offload.memory_node.decode_attention.base import (
    BlockLayout,
    DecodeAttention,
    Region,
)
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry

logger = logging.getLogger(__name__)

#: With this variable set, new blocks hold NaN: what reads them by mistake shows it.
POISON_VARIABLE = "ATTN_OFFLOAD_POISON_KV"


class PagedKVCache:
    """KV blocks of all layers of a session, one region per storage.

    Args:
        geometry: Layers and groups of the session.
        num_blocks: Blocks of every storage.
        attention: Lays out the blocks and allocates them where it attends.
    """

    def __init__(
        self,
        geometry: SessionGeometry,
        num_blocks: int,
        attention: DecodeAttention[Any, Any],
    ) -> None:
        self.num_blocks = num_blocks
        self._strides = _block_bytes(geometry, attention)
        # With what gives it back; of the arena, or of the kernel's own.
        self._regions: dict[int, tuple[Region | memoryview, Callable[[], None]]] = {}
        try:
            for storage, num_bytes in self._strides.items():
                self._regions[storage] = _allocate(attention, num_blocks * num_bytes)
        except BaseException:
            self.close()
            raise
        if os.environ.get(POISON_VARIABLE):
            for region, _ in self._regions.values():
                attention.poison(region)

    def region(self, layer: LayerGeometry) -> Region | memoryview:
        """Memory of the layer's storage, as the attention kernel allocated it."""
        return self._regions[layer.storage][0]

    def block_stride(self, layer: LayerGeometry) -> int:
        """Bytes from block to block in the layer's storage."""
        return self._strides[layer.storage]

    @property
    def num_bytes(self) -> int:
        """Bytes of all regions."""
        return sum(len(region) for region, _ in self._regions.values())

    def close(self) -> None:
        """Give the memory back.

        Raises:
            BufferError: A tensor still views a region.
        """
        for storage, (_, give_back) in list(self._regions.items()):
            give_back()
            del self._regions[storage]


def bytes_per_block(geometry: SessionGeometry, layout: BlockLayout) -> int:
    """Bytes that one block id occupies over all storages of a session."""
    return sum(_block_bytes(geometry, layout).values())


def _block_bytes(geometry: SessionGeometry, layout: BlockLayout) -> dict[int, int]:
    """Bytes of one block of each storage: of the largest layer that shares it."""
    sizes: dict[int, int] = {}
    for layer in geometry.layers:
        block_size = geometry.groups[layer.group].block_size
        num_bytes = layout.block_bytes(layer, block_size, geometry.block_dtype)
        sizes[layer.storage] = max(sizes.get(layer.storage, 0), num_bytes)
    return sizes


def _allocate(
    attention: DecodeAttention[Any, Any], num_bytes: int
) -> tuple[Region | memoryview, Callable[[], None]]:
    """Take memory that was touched at start, if there is any in one piece."""
    arena = attention.arena
    if arena is not None:
        if touched := arena.allocate(num_bytes):
            return touched, functools.partial(arena.free, touched)
        logger.warning(
            "%s are free only in pieces of what was touched at start, and are "
            "taken from the host",
            byte_size(num_bytes),
        )
    region = attention.allocate(num_bytes)
    return region, region.close
