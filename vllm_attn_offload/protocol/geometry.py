# SPDX-License-Identifier: Apache-2.0
"""Shapes of a worker's attention layers, as both sides must see them."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
# Names reach logs and metrics: printable ASCII, so that none of them forges a line.
Name = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"\A[ -~]*\Z")]
Dtype = Literal["float32", "bfloat16", "float16"]
KVDtype = Literal["fp8_e4m3"]
NumHeads = Annotated[int, msgspec.Meta(ge=1, le=4096)]
HeadSize = Annotated[int, msgspec.Meta(ge=1, le=1024)]


class KVGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers that share one block table (vLLM: KVCacheGroupSpec)."""

    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]


class LayerGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One attention layer as a memory node sees it.

    ``storage`` names the pool that holds the layer's blocks: layers of different
    groups may alias one (vLLM: ``KVCacheTensor.layers``).

    Attributes:
        softmax_scale: Factor of ``q k^T``.
        sliding_window: Tokens that a row sees, its own included; 0: all.
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``; 0: they stay.
        alibi_slopes: One per query head, or none (ALiBi, arXiv 2108.12409).
        stores: Whether k and v come with q; without, another layer of the group stores
            them in the same storage (vLLM: ``kv_sharing_target_layer_name``).
        k_scale: Blocks of another dtype hold k / ``k_scale``.
        v_scale: Likewise for v.
    """

    name: Name
    group: Index
    storage: Index
    num_query_heads: NumHeads
    num_kv_heads: NumHeads
    head_size: HeadSize
    v_head_size: HeadSize
    softmax_scale: float
    sliding_window: Index = 0
    soft_cap: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    alibi_slopes: Annotated[tuple[float, ...], msgspec.Meta(max_length=4096)] = ()
    stores: bool = True
    k_scale: float = 1.0
    v_scale: float = 1.0


class SessionGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shapes of one worker's attention layers.

    Attributes:
        dtype: Of q, k, v and out as they travel.
        kv_dtype: Of k and v in blocks (``protocol.e4m3``); None: as they travel.
    """

    dtype: Dtype
    groups: Annotated[list[KVGroup], msgspec.Meta(min_length=1, max_length=64)]
    layers: Annotated[list[LayerGeometry], msgspec.Meta(min_length=1, max_length=4096)]
    kv_dtype: KVDtype | None = None

    @property
    def block_dtype(self) -> Dtype | KVDtype:
        """Type of the elements of blocks."""
        return self.kv_dtype or self.dtype

    def widest_window(self, group: int) -> int:
        """Most tokens that a row sees in any layer of a KV group; 0: all."""
        windows = [each.sliding_window for each in self.layers if each.group == group]
        return 0 if 0 in windows else max(windows, default=0)

    def digest(self) -> str:
        """Hash that worker and node compare before a tensor is exchanged."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()
