# SPDX-License-Identifier: Apache-2.0
"""Storing keys and values: exactly the mapped slots change, to exactly torch's bits."""

from __future__ import annotations

import math

import pytest
import torch
from vllm_attn_offload.triton_kernels import store_kv
from vllm_attn_offload.triton_kernels.reference import naive_store_kv

FP8 = torch.float8_e4m3fn
SLOTS = [0, 15, 16, -1, 63, 40]
CASES = [
    ("fp32", 2, 64, 64, torch.float32, torch.float32, 0),
    ("fp16-odd-sizes", 3, 80, 96, torch.float16, torch.float16, 0),
    ("bf16-mha", 8, 128, 128, torch.bfloat16, torch.bfloat16, 0),
    ("sizes192-128", 2, 192, 128, torch.float32, torch.float32, 0),
    ("fp8", 2, 64, 64, torch.bfloat16, FP8, 0),
    ("fp8-tensor-scale", 2, 64, 64, torch.float16, FP8, 1),
    ("fp8-head-scale", 3, 80, 64, torch.float32, FP8, 3),
]


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.contiguous().view(torch.uint8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_store_kv(
    case: tuple[str, int, int, int, torch.dtype, torch.dtype, int],
    device: torch.device,
) -> None:
    _, heads, head_size, v_head_size, dtype, cache_dtype, num_scales = case
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    key = 3 * draw(len(SLOTS), heads, head_size).to(dtype)
    value = draw(len(SLOTS), heads, v_head_size).to(dtype)
    # Heads outermost in memory: strides that no default layout has.
    caches = [
        torch.full((heads, 4, 16, size), math.nan, device=device)
        .to(cache_dtype)
        .transpose(0, 1)
        for size in (head_size, v_head_size)
    ]
    expected = [cache.clone() for cache in caches]
    scales = draw(2, num_scales).abs() + 0.1 if num_scales else None
    k_scale, v_scale = (None, None) if scales is None else scales.unbind()
    slot_mapping = torch.tensor(SLOTS, device=device)
    store_kv(key, value, *caches, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    naive_store_kv(key, expected[0], slot_mapping, k_scale)
    naive_store_kv(value, expected[1], slot_mapping, v_scale)
    for cache, exact in zip(caches, expected, strict=True):
        assert torch.equal(as_bytes(cache), as_bytes(exact))


def test_store_kv_encodes_e4m3_as_torch_does(device: torch.device) -> None:
    # Every value, every midpoint between neighbours, and both sides of it.
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(FP8).float()
    middles = (codes[1:] + codes[:-1]) / 2
    big = torch.tensor([448.0, 449.0, 1e30, math.inf, math.nan, 2.0**-10])
    values = torch.cat([codes, middles, middles * 0.999, middles * 1.001, big])
    values = torch.cat([values, -values])
    values = torch.nn.functional.pad(values, (0, -len(values) % 16))
    key = values.view(-1, 1, 16).to(device)
    cache = torch.zeros((1, 1, len(key), 16), device=device).to(FP8)
    slot_mapping = torch.arange(len(key), device=device, dtype=torch.int32)
    store_kv(key, None, cache, None, slot_mapping)
    exact = values.clamp(-448, 448).to(FP8).view(torch.uint8)
    stored = cache.view(torch.uint8).flatten().cpu()
    is_nan = values.isnan()
    assert torch.equal(stored[~is_nan], exact[~is_nan])
    assert (stored[is_nan] & 0x7F == 0x7F).all()


def test_store_kv_refuses_tensors_that_do_not_fit(device: torch.device) -> None:
    key = torch.zeros(2, 2, 64, device=device)
    cache = torch.zeros(4, 2, 16, 64, device=device)
    slots = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="3 slots"):
        store_kv(key, key, cache, cache, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="is missing"):
        store_kv(key, key, cache, None, slots)
    with pytest.raises(ValueError, match="of the same dtype"):
        store_kv(key.half(), key.half(), cache, cache, slots)
    with pytest.raises(ValueError, match="pass None"):
        store_kv(key, key, cache, cache, slots, k_scale=slots, v_scale=slots)
