# SPDX-License-Identifier: Apache-2.0
"""Blocks of fp8: every kernel against float64, what they take, and wrong scales."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import msgspec
import pytest
import torch
from node_process import NodeProcess
from paged_batch import PagedBatch, max_error
from random_step import RandomStep
from raw_session import (
    RawSession,
    make_geometry,
    make_hybrid_geometry,
    reservation,
)
from stored_kv import with_fp8

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.memory_node.kv_cache import bytes_per_block
from vllm_attn_offload.protocol.e4m3 import round_to_e4m3, to_e4m3
from vllm_attn_offload.protocol.geometry import Dtype, SessionGeometry

NUM_BLOCKS = 16
STEPS = [[17, 1], [1, 15], [33, 2]]
#: The interpreter is slow.
NUM_SEEDS = {"triton": 4}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_steps_are_exact(
    attention: DecodeAttention[Any, Any], dtype: Dtype
) -> None:
    """Windows, caps, slopes, many rows; blocks that no row sees hold NaN."""
    for seed in range(NUM_SEEDS.get(attention.name, 16)):
        RandomStep(seed, dtype=dtype, is_fp8=True).assert_exact(attention)


def test_large_heads(attention: DecodeAttention[Any, Any]) -> None:
    for seed in range(NUM_SEEDS.get(attention.name, 8)):
        step = RandomStep(seed, head_sizes=(128, 256), dtype="bfloat16", is_fp8=True)
        step.assert_exact(attention)


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_blocks_take_half(attention: DecodeAttention[Any, Any], head_size: int) -> None:
    geometry = make_geometry(head_size=head_size, dtype="bfloat16")
    half, whole = (
        bytes_per_block(each, attention) for each in (with_fp8(geometry), geometry)
    )
    assert 1.9 <= whole / half <= 2


def test_rounding() -> None:
    """Ties go to even numbers, what is too large saturates, NaN stays NaN."""
    rows = torch.tensor([1.0625, 1.1875, 2**-10, 3 * 2**-10, 463.0, -1e9, torch.nan])
    expected = torch.tensor([1.0, 1.25, 0.0, 2**-8, 448.0, -448.0, torch.nan])
    found = to_e4m3(rows, 1.0).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    kept = to_e4m3(every.float() * 0.25, 0.25)
    torch.testing.assert_close(
        kept.float(), every.float(), rtol=0, atol=0, equal_nan=True
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.empty(4, 64, dtype=dtype)
        round_to_e4m3(every.view(4, 64).float(), 1.0, out)
        torch.testing.assert_close(
            out.flatten(), every.to(dtype), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_session(node: NodeProcess, dtype: Dtype) -> None:
    """Layers of one session keep their own scales; other slots hold NaN."""
    geometry = with_fp8(make_geometry(dtype=dtype))
    batch = PagedBatch(geometry, NUM_BLOCKS, num_reqs=2)
    loss = {"float32": 4e-6, "bfloat16": 2**-7}[dtype]
    with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
        step, nans = batch.poison(NUM_BLOCKS)
        session.send_step(step)
        for layer in (0, 1):
            session.attend(layer, nans)
        for num_new in STEPS:
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            for index, layer in enumerate(geometry.layers):
                out, lse = session.attend(index, qkv, want_lse=True)
                exact, exact_lse = batch.expected(torch.float64, layer)
                assert lse is not None
                assert max_error(out, exact) < loss
                assert max_error(lse, exact_lse) < 1e-5


def changed(index: int, **changes: float) -> Callable[[SessionGeometry], Any]:
    def change(geometry: SessionGeometry) -> SessionGeometry:
        layers = list(geometry.layers)
        layers[index] = msgspec.structs.replace(layers[index], **changes)
        return msgspec.structs.replace(geometry, layers=layers)

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changed(0, k_scale=float("nan")), "has k_scale=nan. Allowed"),
        (changed(0, v_scale=0.0), "has v_scale=0.0. Allowed"),
        (changed(1, k_scale=float("inf")), "has k_scale=inf. Allowed"),
        (changed(1, v_scale=-1.0), "has v_scale=-1.0. Allowed"),
        (changed(1, v_scale=1e-300), "has v_scale=1e-300. Allowed"),
        (changed(1, k_scale=2.0**120), "has k_scale=1.3.*e.36. Allowed"),
        (changed(2, k_scale=0.5), "reads fp8 with the scales"),
        (lambda x: msgspec.structs.replace(x, kv_dtype=None), "without a kv_dtype"),
    ],
    ids=["nan", "zero", "inf", "negative", "tiny", "large", "reader", "no dtype"],
)
def test_wrong_scales_are_refused(
    node: NodeProcess, change: Callable[[SessionGeometry], Any], problem: str
) -> None:
    geometry = with_fp8(make_hybrid_geometry())
    with closing(ControlClient(node.address, 5)) as control:
        with pytest.raises(MemoryNodeError, match=problem):
            control.reserve(reservation(change(geometry), 1 << 20))
        # The connection goes on.
        reserved = control.reserve(reservation(geometry, 1 << 20))
        assert reserved.num_blocks > 0


def test_other_types_are_refused() -> None:
    geometry = msgspec.structs.replace(make_geometry(), kv_dtype="fp8_e5m2")
    with pytest.raises(msgspec.ValidationError, match="fp8_e5m2"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(geometry), type=SessionGeometry)
