# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Scatter new keys and values into cache blocks by slot.

cache[slot // block_size, :, slot % block_size] = new / scale. Grid: one program per
token, all its KV heads together.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .prepared_launch import PreparedLaunch

#: Tensors that differ between layers of one kind.
_VARYING = ("key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr")
_SCALES = ("k_scale_ptr", "v_scale_ptr")


@triton.jit
def _encode_e4m3(x):
    """fp32 to e4m3 bits (int32), saturating, rounding half to even; NaN stays NaN.

    By hand, because sm_80 has no such conversion and the interpreter's does not round
    as the hardware's.
    """
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Normal: add half an ulp (a little less for even), drop 20 bits, bias 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the step is 2^-9 = ulp(2^14): adding 2^14 leaves the count in the
    # low bits, rounded by the adder.
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(size < 0.015625, subnormal, normal)
    return sign | tl.where(x != x, 0x7F, code)


@triton.jit
def _store_rows(
    new_ptr,  # [num_heads, head_size], one token
    cache_ptr,  # [num_heads, head_size], one slot
    scale_ptr,  # [1] or [num_heads] fp32
    stride_new_head,
    stride_cache_head,
    stride_scale,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUANTISE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    heads = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    real = (heads < NUM_HEADS)[:, None] & (offs_d < HEAD_SIZE)[None, :]
    rows = tl.load(
        new_ptr + heads[:, None] * stride_new_head + offs_d[None, :], mask=real, other=0
    )  # [BLOCK_H, BLOCK_D]
    if QUANTISE:
        rows = rows.to(tl.float32)
        if HAS_SCALE:
            scale = tl.load(
                scale_ptr + heads * stride_scale, mask=heads < NUM_HEADS, other=1.0
            )
            rows = tl.div_rn(rows, tl.broadcast_to(scale[:, None], rows.shape))
        rows = _encode_e4m3(rows)
    tl.store(
        cache_ptr + heads.to(tl.int64)[:, None] * stride_cache_head + offs_d[None, :],
        rows.to(cache_ptr.dtype.element_ty),
        mask=real,
    )


@triton.jit
def _store_kv_kernel(
    key_ptr,  # [num_tokens, num_kv_heads, head_size]
    value_ptr,  # [num_tokens, num_kv_heads, v_head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache_ptr,  # [num_blocks, num_kv_heads, block_size, v_head_size]
    slot_mapping_ptr,  # [num_tokens] int32 or int64
    k_scale_ptr,  # [1] or [num_kv_heads] fp32
    v_scale_ptr,  # [1] or [num_kv_heads] fp32
    block_size,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_key_block,
    stride_key_cache_head,
    stride_key_slot,
    stride_value_block,
    stride_value_cache_head,
    stride_value_slot,
    stride_k_scale,
    stride_v_scale,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    QUANTISE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_VALUE: tl.constexpr,
):
    # grid: (num_tokens,)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot < 0:
        return
    block = slot // block_size
    offset = slot % block_size
    _store_rows(
        key_ptr + token * stride_key_token,
        key_cache_ptr + block * stride_key_block + offset * stride_key_slot,
        k_scale_ptr,
        stride_key_head,
        stride_key_cache_head,
        stride_k_scale,
        NUM_HEADS,
        HEAD_SIZE,
        BLOCK_H,
        BLOCK_D,
        QUANTISE,
        HAS_SCALES,
    )
    if HAS_VALUE:
        _store_rows(
            value_ptr + token * stride_value_token,
            value_cache_ptr + block * stride_value_block + offset * stride_value_slot,
            v_scale_ptr,
            stride_value_head,
            stride_value_cache_head,
            stride_v_scale,
            NUM_HEADS,
            V_HEAD_SIZE,
            BLOCK_H,
            BLOCK_V,
            QUANTISE,
            HAS_SCALES,
        )


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write new keys and values into their slots; a slot of -1 is skipped.

    Args:
        key: ``[num_tokens, num_kv_heads, head_size]``.
        value: ``[num_tokens, num_kv_heads, v_head_size]``, or None together with
            ``value_cache`` where values are part of the keys (latent KV).
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_size]`` of the key's
            dtype, or ``torch.float8_e4m3fn``: then ``key / k_scale`` is stored,
            saturated at 448 and rounded half to even.
        value_cache: ``[num_blocks, num_kv_heads, block_size, v_head_size]``.
        slot_mapping: ``[num_tokens]`` int32 or int64, block x block_size + offset.
        k_scale: ``[1]`` or ``[num_kv_heads]`` float32; None: 1.
        v_scale: likewise for values.

    Raises:
        ValueError: a tensor does not match the others.
    """
    quantise = key_cache.dtype == torch.float8_e4m3fn
    if (value is None) != (value_cache is None) or (k_scale is None) != (
        v_scale is None
    ):
        raise ValueError(
            "One of value and value_cache, or of k_scale and v_scale, is missing. "
            "Pass both or neither."
        )
    if k_scale is not None and not quantise:
        raise ValueError(
            f"k_scale with a {key_cache.dtype} cache. Scales need a "
            "torch.float8_e4m3fn cache; pass None."
        )
    # Any tensor stands in for an argument whose flag is off.
    new_value = key if value is None else value
    cache_value = key_cache if value_cache is None else value_cache
    _check_pair("key", key, key_cache, slot_mapping)
    _check_pair("value", new_value, cache_value, slot_mapping)
    if key.shape[0]:
        arguments = store_kv_arguments(
            key, new_value, key_cache, cache_value, slot_mapping, k_scale, v_scale
        )
        arguments["HAS_VALUE"] = value is not None
        _store_kv_kernel[(key.shape[0],)](**arguments)


def prepare_store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> PreparedLaunch:
    """Store as `store_kv`, for at least one token, and keep the launch.

    Args:
        key: As there, and so are the others.

    Returns:
        A launch that stores once more, with another ``key_ptr``, ``value_ptr``,
        ``key_cache_ptr`` and ``value_cache_ptr`` of the same shapes and strides, and
        another ``k_scale_ptr`` and ``v_scale_ptr`` where scales were given.

    Raises:
        ValueError: a tensor does not match the others.
    """
    _check_pair("key", key, key_cache, slot_mapping)
    _check_pair("value", value, value_cache, slot_mapping)
    arguments = store_kv_arguments(
        key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale
    )
    varying = _VARYING if k_scale is None else _VARYING + _SCALES
    return PreparedLaunch(_store_kv_kernel, (key.shape[0],), arguments, varying)


def store_kv_arguments(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> dict[str, Any]:
    """Every argument of the kernel by name; tensors as `store_kv` takes them."""
    quantise = key_cache.dtype == torch.float8_e4m3fn
    if quantise:
        key_cache = key_cache.view(torch.uint8)
        value_cache = value_cache.view(torch.uint8)
    _, num_heads, head_size = key.shape
    return {
        "key_ptr": key,
        "value_ptr": value,
        "key_cache_ptr": key_cache,
        "value_cache_ptr": value_cache,
        "slot_mapping_ptr": slot_mapping,
        "k_scale_ptr": slot_mapping if k_scale is None else k_scale,
        "v_scale_ptr": slot_mapping if v_scale is None else v_scale,
        "block_size": key_cache.shape[2],
        "stride_key_token": key.stride(0),
        "stride_key_head": key.stride(1),
        "stride_value_token": value.stride(0),
        "stride_value_head": value.stride(1),
        "stride_key_block": key_cache.stride(0),
        "stride_key_cache_head": key_cache.stride(1),
        "stride_key_slot": key_cache.stride(2),
        "stride_value_block": value_cache.stride(0),
        "stride_value_cache_head": value_cache.stride(1),
        "stride_value_slot": value_cache.stride(2),
        "stride_k_scale": 0 if k_scale is None or k_scale.numel() == 1 else 1,
        "stride_v_scale": 0 if v_scale is None or v_scale.numel() == 1 else 1,
        "NUM_HEADS": num_heads,
        "HEAD_SIZE": head_size,
        "V_HEAD_SIZE": value.shape[2],
        "BLOCK_H": triton.next_power_of_2(num_heads),
        "BLOCK_D": triton.next_power_of_2(head_size),
        "BLOCK_V": triton.next_power_of_2(value.shape[2]),
        "QUANTISE": quantise,
        "HAS_SCALES": k_scale is not None,
        "HAS_VALUE": True,
    }


def _check_pair(
    name: str, new: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    fits = new.dim() == 3 and cache.dim() == 4 and new.shape[0] == slot_mapping.shape[0]
    fits = fits and (cache.shape[1], cache.shape[3]) == tuple(new.shape[1:])
    fits = fits and cache.dtype in (new.dtype, torch.float8_e4m3fn)
    if not fits or (new.numel() and new.stride(-1) != 1) or cache.stride(-1) != 1:
        raise ValueError(
            f"{name} {tuple(new.shape)} {new.dtype} strides {new.stride()} into a "
            f"cache {tuple(cache.shape)} {cache.dtype} strides {cache.stride()} with "
            f"{slot_mapping.shape[0]} slots. Pass [tokens, heads, size] and [blocks, "
            "heads, slots, size], one slot per token, last dimension contiguous, the "
            "cache of the same dtype or torch.float8_e4m3fn."
        )
