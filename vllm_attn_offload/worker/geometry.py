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
    time.

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
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return SessionGeometry(
        cast(Dtype, dtype),
        [
            KVGroup(spec.kv_cache_spec.block_size)
            for spec in kv_cache_config.kv_cache_groups
        ],
        [
            _layer_geometry(name, layer, *places[_owner(name, layers)])
            for name, layer in layers.items()
        ],
    )


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
