# SPDX-License-Identifier: Apache-2.0
"""``LLM(attention_offload=True)`` against stock vLLM on a real model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import workload
from equality import assert_identical
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

from vllm_attn_offload.attention.micro_batch.choice import NUM_SAMPLES
from vllm_attn_offload.engine.cpu_quota import cpu_quota

Generated = Callable[[str, str], dict[str, Any]]

pytestmark = pytest.mark.long


def _num_cores() -> int:
    """Cores that vLLM would bind threads to."""
    cores = {(each.numa_node, each.physical_core) for each in get_allowed_cpu_list()}
    return int(min(len(cores), cpu_quota()))


def test_llm_float32_is_identical(generated: Generated) -> None:
    """Chunked prefill, cache hits, preemption, n > 1: the same tokens."""
    stock, offload = generated("float32", "stock"), generated("float32", "offload")
    assert len(stock["greedy"]) >= 24
    assert_identical(stock["greedy"], offload["greedy"])
    assert_identical(stock["several"], offload["several"])


@pytest.mark.skipif(_num_cores() < 2, reason="takes two cores")
def test_llm_divides_its_cpus(generated: Generated) -> None:
    """Some of its steps ran cut, on CPUs that worker and node otherwise share."""
    (times,) = generated("float32", "offload")["times"]
    assert times["divides_cpus"]
    assert times["num_cut_steps"] >= NUM_SAMPLES


@pytest.mark.parametrize("mode", ["heads-3", "blocks-2", "blocks-2-tp-3"])
def test_llm_float32_with_several_nodes(generated: Generated, mode: str) -> None:
    """Nodes whose unused memory holds NaN, other chunk sizes, without a cache, TP."""
    stock, offload = generated("float32", "stock"), generated("float32", mode)
    assert_identical(_kept(stock, mode), offload["greedy"])


def _kept(stock: dict[str, Any], mode: str) -> list[dict[str, Any]]:
    """Stock's completions of the prompts that a mode does not leave out."""
    longest = workload.MODES[mode].longest
    kept = [
        completion
        for completion, length in zip(stock["greedy"], stock["lengths"], strict=True)
        if length <= longest
    ]
    assert len(kept) >= 10
    return kept


def test_llm_float32_in_micro_batches(generated: Generated) -> None:
    """Most steps are cut, and tokens are stock's, also where prompts share blocks."""
    stock, offload = (
        generated("float32", "stock"),
        generated("float32", "micro-batches"),
    )
    assert_identical(_kept(stock, "micro-batches"), offload["greedy"])
    assert_identical(stock["several"], offload["several"])
    assert len(offload["together"]) == 20
    assert all(tokens == stock["together"][0] for tokens in offload["together"])
    assert offload["joined"]["tokens"] == stock["joined"]["tokens"]
    (times,) = offload["times"]
    assert times["num_cut_steps"] > 0.5 * times["num_decode_steps"] > 0


def test_llm_float32_adapters_in_micro_batches(generated: Generated) -> None:
    """Each half takes the LoRA adapters of its own rows; both adapters matter."""
    stock = generated("float32", "stock")["adapted"]
    assert generated("float32", "micro-batches")["adapted"] == stock
    assert len({tuple(tokens) for tokens in stock}) == len(stock)


def test_llm_float32_reads_what_the_step_writes(generated: Generated) -> None:
    """A request that reads a block of this step's writer keeps the step whole."""
    joined = generated("float32", "micro-batches")["joined"]
    assert joined["joined"] == [1, 0]


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
