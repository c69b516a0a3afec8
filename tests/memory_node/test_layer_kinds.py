# SPDX-License-Identifier: Apache-2.0
"""Windows, caps, slopes and positions: every kernel against float64, and no other read.

Blocks that no row sees, the null block included, hold NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
from random_step import RandomStep

from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.protocol.geometry import Dtype

ROUNDS = 3
PER_ROUND = 16
#: The interpreter is slow: of every round so many.
PER_ROUND_OF_TRITON = 5


def num_steps(attention: DecodeAttention[Any, Any]) -> int:
    return PER_ROUND_OF_TRITON if attention.name == "triton" else PER_ROUND


@pytest.mark.parametrize("first_seed", range(0, ROUNDS * PER_ROUND, PER_ROUND))
def test_random_steps_are_exact(
    attention: DecodeAttention[Any, Any], first_seed: int
) -> None:
    for seed in range(first_seed, first_seed + num_steps(attention)):
        RandomStep(seed).assert_exact(attention)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_random_steps_in_half_precision(
    attention: DecodeAttention[Any, Any], dtype: Dtype
) -> None:
    for seed in range(num_steps(attention)):
        RandomStep(seed, dtype=dtype).assert_exact(attention)


def test_random_steps_of_large_heads(attention: DecodeAttention[Any, Any]) -> None:
    for seed in range(num_steps(attention)):
        RandomStep(seed, head_sizes=(256, 512)).assert_exact(attention)
