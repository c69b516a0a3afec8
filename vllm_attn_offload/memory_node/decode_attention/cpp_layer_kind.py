# SPDX-License-Identifier: Apache-2.0
"""Layers that the compiled CPU kernels plan together."""

from __future__ import annotations

import weakref

from vllm_attn_offload.native.attention import CpuCache, CpuKernelLibrary
from vllm_attn_offload.protocol.geometry import LayerGeometry
from vllm_attn_offload.protocol.layer import TokenLayout


class CppLayerKind:
    """Layers of a group that can share a plan, and their cache geometry.

    Args:
        library: The built library.
        layer: One of them.
        cache: Owned from here on.
        dtype: Of payloads and results; blocks may be of fp8 instead.
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


def create_cache(
    library: CpuKernelLibrary,
    layer: LayerGeometry,
    num_blocks: int,
    block_size: int,
    dtype: str,
    block_stride: int = 0,
) -> CpuCache:
    """Describe blocks of a layer's shape.

    Args:
        library: The built library.
        layer: The layer.
        num_blocks: Blocks that a plan may name.
        block_size: Their tokens.
        dtype: Of what they hold.
        block_stride: Bytes from block to block; 0: no gap.

    Raises:
        ValueError: The kernels do not support the layer's head sizes.
    """
    return library.create_cache(
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=layer.num_kv_heads,
        head_size=layer.head_size,
        v_head_size=layer.v_head_size,
        dtype=dtype,
        block_stride=block_stride,
    )
