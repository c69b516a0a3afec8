# SPDX-License-Identifier: Apache-2.0
"""Whether the layers of a geometry can share a session and its storages."""

from __future__ import annotations

import math

from vllm_attn_offload.protocol.geometry import LayerGeometry, SessionGeometry

_SAME_MODEL = "Use the same version of vllm-attn-offload on both sides."
#: Kernels multiply them by the softmax scale, and by 256 where they read fp8 as its
#: 256th part, in fp32; so far from the ends of its range the products stay normal.
_MIN_SCALE, _MAX_SCALE = 2.0**-100, 2.0**100


def check_geometry(geometry: SessionGeometry) -> None:
    """Check what single fields do not show.

    Raises:
        ValueError: A layer contradicts itself, its group or its storage.
    """
    writers: dict[tuple[int, int], LayerGeometry] = {}
    for layer in geometry.layers:
        if layer.group >= len(geometry.groups):
            raise ValueError(
                f"layer {layer.name} names KV group {layer.group}, which is missing"
            )
        _check_heads(layer)
        _check_scores(layer)
        _check_kv_scales(layer, geometry.kv_dtype)
        place = (layer.group, layer.storage)
        if layer.stores and place in writers:
            raise ValueError(
                f"layers {writers[place].name} and {layer.name} of KV group "
                f"{layer.group} both store into storage {layer.storage}; one layer of "
                f"a group may. {_SAME_MODEL}"
            )
        if layer.stores:
            writers[place] = layer
    for layer in geometry.layers:
        if not layer.stores:
            _check_reader(layer, writers.get((layer.group, layer.storage)))
    empty = set(range(len(geometry.groups))) - {x.group for x in geometry.layers}
    if empty:
        raise ValueError(
            f"KV group {min(empty)} has no layer; each must have one. {_SAME_MODEL}"
        )


def _check_heads(layer: LayerGeometry) -> None:
    if layer.num_query_heads % layer.num_kv_heads:
        raise ValueError(
            f"layer {layer.name} has {layer.num_query_heads} query heads for "
            f"{layer.num_kv_heads} KV heads; it must be a multiple"
        )
    if len(layer.alibi_slopes) not in (0, layer.num_query_heads):
        raise ValueError(
            f"layer {layer.name} has {len(layer.alibi_slopes)} ALiBi slopes for "
            f"{layer.num_query_heads} query heads; one each, or none, are allowed. "
            f"{_SAME_MODEL}"
        )


def _check_scores(layer: LayerGeometry) -> None:
    numbers = (layer.softmax_scale, layer.soft_cap, *layer.alibi_slopes)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"layer {layer.name} has a scale, soft cap or ALiBi slope that is not "
            "finite; all must be. Check the model's config.json."
        )


def _check_kv_scales(layer: LayerGeometry, kv_dtype: str | None) -> None:
    for name, scale in (("k_scale", layer.k_scale), ("v_scale", layer.v_scale)):
        if not _MIN_SCALE <= scale <= _MAX_SCALE:
            raise ValueError(
                f"layer {layer.name} has {name}={scale}. Allowed are finite numbers "
                f"from {_MIN_SCALE:.2g} to {_MAX_SCALE:.2g}. Check the scales of the "
                "KV cache in the checkpoint, or pass --kv-cache-dtype bfloat16."
            )
        if scale != 1.0 and kv_dtype is None:
            raise ValueError(
                f"layer {layer.name} has {name}={scale} without a kv_dtype; only "
                f"blocks of another dtype than q may have scales. {_SAME_MODEL}"
            )


def _check_reader(layer: LayerGeometry, writer: LayerGeometry | None) -> None:
    """Refuse a layer that stores nothing where nobody stores what it reads."""
    if writer is None:
        raise ValueError(
            f"layer {layer.name} reads storage {layer.storage}, into which no layer of "
            f"KV group {layer.group} stores; one must. {_SAME_MODEL}"
        )
    read, stored = (
        (each.num_kv_heads, each.head_size, each.v_head_size)
        for each in (layer, writer)
    )
    scales, wanted = ((each.k_scale, each.v_scale) for each in (layer, writer))
    if scales != wanted:
        raise ValueError(
            f"layer {layer.name} reads fp8 with the scales {scales}, and layer "
            f"{writer.name} stores with {wanted}; they must be the same. {_SAME_MODEL}"
        )
    if read != stored:
        raise ValueError(
            f"layer {layer.name} reads KV heads and head sizes {read}, and layer "
            f"{writer.name} stores {stored}; they must be the same. {_SAME_MODEL}"
        )
