# SPDX-License-Identifier: Apache-2.0
"""A worker's attention layers as memory nodes see them, grouped as vLLM groups them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_attn_offload.attention.impl import AttentionOffloadImpl
from vllm_attn_offload.attention.layers import attention_layers
from vllm_attn_offload.protocol.geometry import (
    Dtype,
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def session_geometry(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> SessionGeometry:
    """Shapes of the layers, in the order of `attention_layers`.

    Layers of different groups that are at the same place in their groups share a
    storage, as they share memory in vLLM's pool: a block belongs to one group at a
    time. Layers with chunked local attention are a group of their own wherever vLLM
    puts them, because it cuts their requests into virtual ones
    (`make_local_attention_virtual_batches`).

    Args:
        vllm_config: The worker's configuration, with its layers.
        kv_cache_config: How vLLM groups them.
    """
    places = {
        name: (group, index)
        for group, spec in enumerate(kv_cache_config.kv_cache_groups)
        for index, name in enumerate(spec.layer_names)
    }
    layers = attention_layers(vllm_config)
    placed = {name: places[_owner(name, layers)] for name in layers}
    kinds = {name: (placed[name][0], _chunk_size(layers[name])) for name in layers}
    groups = sorted(set(kinds.values()))
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return SessionGeometry(
        cast(Dtype, dtype),
        [
            KVGroup(kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size)
            for group, _ in groups
        ],
        [
            _layer_geometry(name, layer, groups.index(kinds[name]), placed[name][1])
            for name, layer in layers.items()
        ],
    )


def _chunk_size(layer: Attention) -> int:
    """Tokens of a chunk that a row does not see past; 0: there are no chunks."""
    return getattr(layer, "attention_chunk_size", 0)


def _owner(name: str, layers: dict[str, Attention]) -> str:
    """The layer whose KV this one uses; itself but for layers that share."""
    return layers[name].kv_sharing_target_layer_name or name


def _layer_geometry(
    name: str, layer: Attention, group: int, storage: int
) -> LayerGeometry:
    attention = cast(AttentionOffloadImpl, layer.impl).attention
    slopes = attention.alibi_slopes
    return LayerGeometry(
        name=name,
        group=group,
        storage=storage,
        num_query_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_size=layer.head_size,
        v_head_size=layer.head_size_v,
        softmax_scale=attention.softmax_scale,
        sliding_window=attention.sliding_window,
        soft_cap=attention.soft_cap,
        alibi_slopes=() if slopes is None else tuple(slopes.tolist()),
        stores=layer.kv_sharing_target_layer_name is None,
    )
