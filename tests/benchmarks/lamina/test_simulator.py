# SPDX-License-Identifier: Apache-2.0
"""The event simulator against schedules worked out by hand, and its invariants."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from lamina.conditions import Failures, NodeLoss, SimulationConfig
from lamina.scenario import simulate, simulate_offload

from vllm_attn_offload.planner.estimate.deployment import evaluate_offload
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.traces import Request
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.catalogue import (
    Catalogue,
    load_catalogue,
    parse_network,
)
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.model.config import read_model_shape
from vllm_attn_offload.planner.model.shape import ModelShape


@dataclass
class FixedSteps:
    """Every step has the same times; a prompt token takes `prefill_s`."""

    model_s: float = 1.0
    attention_s: float = 0.0
    prefill_s: float = 0.0
    num_micro_batches: int = 1

    def decode(
        self, rows: float, context: float, num_micro_batches: int
    ) -> tuple[float, float, float]:
        return self.model_s, self.attention_s, 0.0

    def overhead(self, batch: int) -> float:
        return 0.0

    def prefill(self, tokens: float, context: float) -> float:
        return tokens * self.prefill_s


@pytest.fixture(scope="module")
def llama(root: Path) -> ModelShape:
    """Llama-3-70B, through the real transformers config class."""
    return read_model_shape(str(root / "tests/planner/configs/llama-3-70b"))


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


ROOMY = SimulationConfig(kv_tokens=1_000_000)


def test_two_requests_overlap() -> None:
    # Steps of 1 s: A runs t = 0..4; B arrives at 1.5 and joins at 2, ends at 5.
    result = simulate([Request(0, 10, 4), Request(1.5, 10, 3)], FixedSteps(), ROOMY)
    assert result.makespan_s == 5
    assert result.tokens_per_s == 7 / 5
    # B waits from 1.5 to 2 and gets its token at 3.
    assert result.ttft_p99_s == pytest.approx(1.5, abs=0.01)
    assert result.mean_batch == 7 / 5


def test_prefill_delays_running_requests() -> None:
    # Prompts of 10 at 0.1 s a token: each admission adds 1 s to one step.
    steps = FixedSteps(prefill_s=0.1)
    result = simulate([Request(0, 10, 4), Request(1.5, 10, 1)], steps, ROOMY)
    assert result.makespan_s == 6
    assert (result.tbt_p50_s, result.tbt_p99_s) == (2, 2)


def test_full_cache_preempts_the_newest() -> None:
    # 2 x 10 prompt tokens and room for 30: full after 5 steps; B loses its place,
    # returns when A has finished at 8, and is recomputed.
    config = SimulationConfig(kv_tokens=30)
    result = simulate([Request(0, 10, 8), Request(0, 10, 8)], FixedSteps(), config)
    assert result.num_preemptions == 1
    assert result.num_finished == 2
    assert result.makespan_s == 8 + 3
    assert result.kv_peak_share == 1.0


def test_too_long_request_is_refused() -> None:
    config = SimulationConfig(kv_tokens=30)
    result = simulate([Request(0, 29, 8), Request(0, 10, 8)], FixedSteps(), config)
    assert (result.num_refused, result.num_finished) == (1, 1)
    with pytest.raises(ValueError, match="No request of the trace fits"):
        simulate([Request(0, 29, 8)], FixedSteps(), config)


def test_two_micro_batches_hide_attention() -> None:
    """Half the rows take half the time here: 2 s serial, 1 s rotated."""

    class PerRow(FixedSteps):
        def decode(
            self, rows: float, context: float, num_micro_batches: int
        ) -> tuple[float, float, float]:
            return rows / 2, rows / 2, 0.0

    pair = [Request(0, 10, 100), Request(0, 10, 100)]
    assert simulate(pair, PerRow(), ROOMY).tbt_p50_s == 2.0
    assert simulate(pair, PerRow(num_micro_batches=2), ROOMY).tbt_p50_s == 1.0
    # One request cannot be cut in two, and weights read twice are not worth it.
    assert simulate(pair[:1], PerRow(num_micro_batches=2), ROOMY).tbt_p50_s == 1.0
    fixed = FixedSteps(model_s=1.0, attention_s=0.1, num_micro_batches=2)
    assert simulate(pair, fixed, ROOMY).tbt_p50_s == 1.1


def test_node_loss_pauses_and_recomputes() -> None:
    # Lost at t = 2 after two tokens, down for 5 s; the rest takes 6 steps.
    loss = NodeLoss(at_s=2, down_s=5)
    config = replace(ROOMY, failures=Failures(losses=(loss,)))
    result = simulate([Request(0, 10, 8)], FixedSteps(), config)
    assert result.makespan_s == 2 + 5 + 6
    assert result.num_preemptions == 1
    assert result.num_finished == 1


def test_lost_capacity_slows_attention() -> None:
    loss = NodeLoss(at_s=2, down_s=0, is_replaced=False)
    config = replace(ROOMY, num_nodes=2, failures=Failures(losses=(loss,)))
    steps = FixedSteps(model_s=0, attention_s=1.0)
    # 2 steps on two nodes, 6 on one at twice the time.
    assert simulate([Request(0, 1, 8)], steps, config).makespan_s == 2 + 12


def test_stragglers_stretch_attention() -> None:
    slow = Failures(straggler_probability=0.1, straggler_factor=3.0)
    config = replace(ROOMY, num_nodes=4, failures=slow)
    steps = FixedSteps(model_s=0, attention_s=1.0)
    result = simulate([Request(0, 1, 20_000)], steps, config)
    # The slowest of four is slow with 1 - 0.9^4 = 34.4 %, and then three times.
    assert result.makespan_s / 20_000 == pytest.approx(1 + 2 * 0.3439, rel=0.03)


@pytest.mark.parametrize("engines", [1, 8])
def test_shared_nodes_saturate(engines: int) -> None:
    """Engines that only need attention use the nodes fully, but never more."""
    steps = FixedSteps(model_s=0.01, attention_s=1.0)
    requests = [Request(0, 1, 100)] * engines
    config = replace(ROOMY, max_chunk=10)
    result = simulate(requests, steps, config, engines, shares_memory=True)
    assert result.memory_utilization == pytest.approx(1.0, abs=0.02)


def test_tokens_are_conserved() -> None:
    rng = random.Random(0)
    requests = [
        Request(i * 0.5, rng.randint(1, 40), rng.randint(1, 30)) for i in range(500)
    ]
    config = SimulationConfig(
        kv_tokens=300, failures=Failures(losses=(NodeLoss(50, 10),))
    )
    result = simulate(requests, FixedSteps(prefill_s=0.01), config)
    assert result.num_finished == 500
    total = sum(r.output for r in requests)
    assert result.tokens_per_s * result.makespan_s == pytest.approx(total)
    assert result.kv_peak_share <= 1.0


def test_steady_state_equals_the_closed_form(
    llama: ModelShape, catalogue: Catalogue
) -> None:
    """Requests of equal length at a full cache: within 5 % of the plan's numbers."""
    h100, h20 = catalogue.device("H100"), catalogue.device("H20")
    network = parse_network("400Gbps", catalogue)
    offload = Offload(DeviceCount(h100, 2), DeviceCount(h20, 4), network)
    # Arrivals at start spread over one lifetime, so that contexts are mixed.
    requests = [Request(0, 2000 - 400 + i % 400, 800 - i % 400) for i in range(3000)]
    load = Workload(2000, 1600, 600, prefill="none")
    plan = evaluate_offload(llama, offload, load, 1.0, 1)
    result = simulate_offload(llama, offload, load, requests)
    assert result.loaded_tokens_per_s == pytest.approx(plan.tokens_per_s, rel=0.05)


def test_hundreds_of_nodes_and_full_trace_size_are_fast(
    llama: ModelShape, catalogue: Catalogue
) -> None:
    """19,366 requests of Azure-Conv's mean size on 16 engines and 256 nodes."""
    rng = random.Random(0)
    requests = [
        Request(i * 0.18, rng.randint(1, 2300), rng.randint(1, 420))
        for i in range(19_366)
    ]
    offload = Offload(
        DeviceCount(catalogue.device("H100"), 2),
        DeviceCount(catalogue.device("H20"), 256),
        parse_network("400Gbps", catalogue),
        partition="blocks",
    )
    start = time.process_time()
    result = simulate_offload(
        llama,
        offload,
        Workload(1227, 1155, 211),
        requests,
        num_engines=16,
    )
    assert time.process_time() - start < 60
    assert result.num_finished == 19_366
