# SPDX-License-Identifier: Apache-2.0
"""``LLM(attention_offload=True)`` against stock vLLM on a real model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import workload
from equality import assert_close_bf16, assert_identical

Generated = Callable[[str, str], dict[str, Any]]


def test_llm_float32_is_identical(generated: Generated) -> None:
    """Chunked prefill, cache hits, preemption, n > 1: the same tokens."""
    stock, offload = generated("float32", "stock"), generated("float32", "offload")
    assert len(stock["greedy"]) >= 24
    assert_identical(stock["greedy"], offload["greedy"])
    assert_identical(stock["several"], offload["several"])


def test_llm_float32_covers_scheduling(generated: Generated) -> None:
    """The workload does what it is chosen for, on both sides alike."""
    stock, offload = generated("float32", "stock"), generated("float32", "offload")
    assert offload["metrics"] == stock["metrics"]
    assert offload["metrics"]["vllm:num_preemptions"] >= 1
    assert offload["metrics"]["vllm:prefix_cache_hits"] >= workload.BLOCK_TOKENS


def test_llm_allocates_one_block(generated: Generated) -> None:
    """The worker holds one block per layer: 30 layers, K and V, 3 heads of 64."""
    (stub_bytes,) = generated("float32", "offload")["stub_bytes"]
    assert stub_bytes == 30 * 2 * workload.BLOCK_TOKENS * 3 * 64 * 4


def test_llm_bfloat16_is_close(
    generated: Generated, capsys: pytest.CaptureFixture[str]
) -> None:
    """bf16 parts from stock only where rounding decides."""
    stock, offload = generated("bfloat16", "stock"), generated("bfloat16", "offload")
    report = assert_close_bf16(stock["greedy"], offload["greedy"])
    with capsys.disabled():
        print(f"\nLLM(), {report}")  # noqa: T201
