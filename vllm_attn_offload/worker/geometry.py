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
    KVDtype,
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: By vLLM's names; others are those of the model.
_KV_DTYPES: dict[str, KVDtype] = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3"}


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

    Raises:
        ValueError: Only some layers have a quantised KV cache, or one has several
            scales.
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
            _layer_geometry(
                name,
                layer,
                layers[_owner(name, layers)],
                groups.index(kinds[name]),
                placed[name][1],
            )
            for name, layer in layers.items()
        ],
        _kv_dtype(layers),
    )


def _kv_dtype(layers: dict[str, Attention]) -> KVDtype | None:
    found = {name: layer.kv_cache_dtype for name, layer in layers.items()}
    kinds = {_KV_DTYPES.get(dtype) for dtype in found.values()}
    if len(kinds) > 1:
        names = {dtype: name for name, dtype in found.items()}
        raise ValueError(
            "Attention offloading does not support KV caches of several dtypes: "
            f"{', '.join(f'{name} has {dtype}' for dtype, name in names.items())}. "
            "Allowed: one for all layers. Pass --kv-cache-dtype bfloat16, or float16."
        )
    return kinds.pop()


def _check_scales(layer: Attention) -> None:
    """Refuse scales per head, of which vLLM's one number is the largest."""
    for name in ("k", "v"):
        num_scales = getattr(layer, f"_{name}_scale").numel()
        if num_scales > 1:
            raise ValueError(
                f"Layer {layer.layer_name} has {num_scales} {name} scales of its KV "
                "cache. Allowed: one per layer. Pass --kv-cache-dtype bfloat16, or "
                "float16."
            )


def _chunk_size(layer: Attention) -> int:
    """Tokens of a chunk that a row does not see past; 0: there are no chunks."""
    return getattr(layer, "attention_chunk_size", 0)


def _owner(name: str, layers: dict[str, Attention]) -> str:
    """The layer whose KV this one uses; itself but for layers that share."""
    return layers[name].kv_sharing_target_layer_name or name


def _layer_geometry(
    name: str, layer: Attention, owner: Attention, group: int, storage: int
) -> LayerGeometry:
    attention = cast(AttentionOffloadImpl, layer.impl).attention
    slopes = attention.alibi_slopes
    k_scale = v_scale = 1.0
    if owner.kv_cache_dtype in _KV_DTYPES:
        # Those of the layer that stores: they are the units of what is stored.
        _check_scales(owner)
        k_scale = cast(float, owner._k_scale_float)
        v_scale = cast(float, owner._v_scale_float)
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
        k_scale=k_scale,
        v_scale=v_scale,
    )
