# SPDX-License-Identifier: Apache-2.0
"""Numbers of Lamina (arXiv 2405.01814v2) that follow from its own tables."""

from __future__ import annotations

from statistics import mean

import pytest

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.deployment import (
    Estimate,
    evaluate_homogeneous,
    evaluate_offload,
)
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.catalogue import Catalogue
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.shape import ModelShape, gqa_layers

NO_NETWORK = Network("free", gbps=1e9, latency_us=0)


def paper_model(
    weights_gb: float, layers: int, hidden: int, heads: int, queries_per_kv: int
) -> ModelShape:
    """Table 3: FP16 weights, so half as many parameters as bytes."""
    shape = (gqa_layers(layers, heads, heads // queries_per_kv, hidden // heads),)
    return ModelShape("paper", hidden, shape, weights_gb * 1e9 / 2, weights_gb * 1e9)


LLAMA_33B = paper_model(64.7, 60, 6656, 52, 1)
LLAMA_65B = paper_model(130.1, 80, 8192, 64, 1)
LLAMA3_70B = paper_model(137.5, 80, 8192, 64, 8)
# Table 5: compute and memory devices against homogeneous H100s.
PAIRS = [(LLAMA_33B, 1, 2, 2), (LLAMA_65B, 2, 4, 4), (LLAMA3_70B, 2, 4, 4)]
# Decode-weighted mean context of the public Azure-Conv, Azure-Code, Kimi-Conv traces.
CONTEXTS = (1226.5, 2130.4, 13125.4)


def pair(
    catalogue: Catalogue, model: ModelShape, a: int, b: int, t: int, context: float
) -> tuple[Estimate, Estimate]:
    h100, h20 = catalogue.device("H100").ideal(), catalogue.device("H20").ideal()
    prices = "lamina-table-1"
    ours, theirs = (d.usd_per_hour(prices) for d in (h100, h20))
    load = Workload(context, 1, 1, prefill="none")
    offload = Offload(DeviceCount(h100, a), DeviceCount(h20, b), NO_NETWORK)
    return (
        evaluate_offload(model, offload, load, a * ours + b * theirs, 2),
        evaluate_homogeneous(model, DeviceCount(h100, t), load, t * ours),
    )


def test_equal_cost_prices_to_the_cent(catalogue: Catalogue) -> None:
    small, small_h100 = pair(catalogue, *PAIRS[0], CONTEXTS[0])
    large, large_h100 = pair(catalogue, *PAIRS[2], CONTEXTS[0])
    found = [e.usd_per_hour for e in (small, small_h100, large, large_h100)]
    assert [round(usd, 2) for usd in found] == [20.32, 22.12, 40.64, 44.24]


def test_batch_gain_within_ten_percent(catalogue: Catalogue) -> None:
    """Published: 2.39x on average. Fractional batches, as rounding is 30 % at B = 3."""
    gains = []
    for model, _, b, t in PAIRS:
        h100, h20 = catalogue.device("H100"), catalogue.device("H20")
        ours = cost.memory_budget(h20, b)
        theirs = cost.memory_budget(h100, t) - model.weight_bytes
        gains.append(ours / theirs)
    assert mean(gains) == pytest.approx(2.39, rel=0.10)


def test_llama3_70b_batch_at_dop_2_4(catalogue: Catalogue) -> None:
    ours, _ = pair(catalogue, *PAIRS[2], CONTEXTS[0])
    assert ours.batch == pytest.approx(800, rel=0.10)


def test_min_bandwidth_curve(catalogue: Catalogue) -> None:
    """At most 30 GB/s up to B = 300 at alpha = 0.2 (section 3.3), per memory device.

    The formula's total is 36 to 93 GB/s with ideal times; read per memory device it
    meets the published bound to 2 %.
    """
    h100, h20 = catalogue.device("H100").ideal(), catalogue.device("H20").ideal()

    def need(rows: int, context: int, dop: tuple[int, int]) -> float:
        model_s = cost.model_time(LLAMA3_70B, h100, dop[0], rows)
        attention_s = cost.attention_time(LLAMA3_70B, h20, dop[1], rows, context)
        return cost.min_bandwidth(LLAMA3_70B, rows, model_s, attention_s, 0.2)

    for context in (4096, 8192):
        for dop in ((2, 2), (2, 4)):
            curve = [need(rows, context, dop) for rows in range(1, 301)]
            assert max(curve) / dop[1] <= 30e9 * 1.02
            assert curve[:290] == sorted(curve[:290])
    assert need(300, 8192, (2, 4)) < need(300, 4096, (2, 4))


@pytest.mark.parametrize(
    ("index", "context", "tokens_per_s"),
    # Hand-computed ideal rooflines, n = 2, fractional batches; all-reduce left out.
    [(0, 1226.5, 2282), (1, 1226.5, 2767), (2, 2130.4, 12059), (2, 13125.4, 1958)],
)
def test_ideal_throughput(
    catalogue: Catalogue, index: int, context: float, tokens_per_s: float
) -> None:
    ours, _ = pair(catalogue, *PAIRS[index], context)
    assert ours.tokens_per_s == pytest.approx(tokens_per_s, rel=0.07)
