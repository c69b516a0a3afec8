# SPDX-License-Identifier: Apache-2.0
"""Recurrent states take memory and time of the compute devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.compare import Comparison, compare
from vllm_attn_offload.planner.estimate.deployment import (
    DoesNotFitError,
    evaluate_homogeneous,
    evaluate_offload,
)
from vllm_attn_offload.planner.estimate.engine_times import EngineTimes
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.question import Question
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.catalogue import Catalogue
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.shape import ModelShape
from vllm_attn_offload.planner.report import comparison_json, format_comparison

CONTEXTS = (8192, 32768, 131072)


def _load(context: int) -> Workload:
    return Workload(context, context - 128, 256)


def _offload(catalogue: Catalogue, num_nodes: int) -> Offload:
    h100, h20 = catalogue.device("H100"), catalogue.device("H20")
    network = Network("400Gbps", 400, latency_us=20)
    return Offload(DeviceCount(h100, 1), DeviceCount(h20, num_nodes), network)


def _compare(shape: ModelShape, catalogue: Catalogue, num_nodes: int) -> Comparison:
    offload = _offload(catalogue, num_nodes)
    return compare(Question(shape, offload, _load(8192)))


@pytest.mark.parametrize("context", CONTEXTS)
def test_tokens_that_fit_at_the_same_compute_memory(
    qwen36_27b: ModelShape, catalogue: Catalogue, context: int
) -> None:
    """One H100 alone, and with four H20 that hold the KV."""
    shape, offload = qwen36_27b, _offload(catalogue, 4)
    stock = evaluate_homogeneous(shape, offload.compute, _load(context), None)
    ours = evaluate_offload(shape, offload, _load(context), None)
    left = 0.9 * 80e9 - shape.weight_bytes
    states = 2 * 153_944_064
    assert stock.batch == left // (context * 65_536 + states)
    assert stock.batch_limit == "memory"
    held = {"states": left // states, "memory": 4 * 0.9 * 96e9 // (context * 65_536)}
    assert ours.batch_limit == min(held, key=lambda limit: held[limit])
    assert ours.batch == held[ours.batch_limit]
    assert ours.batch >= 2.5 * stock.batch


def test_a_step_reads_and_writes_every_state(
    qwen36_27b: ModelShape, catalogue: Catalogue
) -> None:
    shape, h100 = qwen36_27b, catalogue.device("H100")
    state_s = cost.state_time(shape, h100, 1, 16)
    moved = 2 * 16 * 153_944_064
    assert state_s == pytest.approx(moved / (h100.memory_gbps * 1e9 * 0.85))
    assert cost.state_time(shape, h100, 2, 16) == pytest.approx(state_s / 2)
    without = replace(shape, states=None)
    for offload in (None, _offload(catalogue, 2)):
        decode, free = (
            EngineTimes(each, DeviceCount(h100, 1), offload).decode(16, 8192, 1)
            for each in (shape, without)
        )
        # The same model without states would have 16 layers.
        layers_s = 48 * h100.layer_overhead_us * 1e-6
        assert decode[0] == pytest.approx(free[0] + state_s + layers_s)
        assert decode[1:] == free[1:]


def test_layers_without_attention_communicate_and_cost(
    qwen36_27b: ModelShape, catalogue: Catalogue
) -> None:
    h100 = replace(catalogue.device("H100"), layer_overhead_us=10)
    without = replace(qwen36_27b, states=None)
    assert cost.allreduce_time(qwen36_27b, h100, 2, 8) == pytest.approx(
        4 * cost.allreduce_time(without, h100, 2, 8)
    )
    more_s = cost.layers_time(qwen36_27b, h100, 1, 8)
    more_s -= cost.layers_time(without, h100, 1, 8)
    assert more_s == pytest.approx(48 * 10e-6)


def test_states_are_named_where_they_limit_the_batch(
    qwen36_27b: ModelShape, catalogue: Catalogue
) -> None:
    result = _compare(qwen36_27b, catalogue, 4)
    assert result.best_offload is not None
    assert result.best_offload.batch_limit == "states"
    assert "limited by recurrent states" in result.verdict
    text = " ".join(format_comparison(result).split())
    assert "65,536 B of KV per token, 153.9 MB in a recurrent state" in text
    assert "(states)" in text
    assert "the batch is limited by the recurrent states on 1xH100" in text
    document = comparison_json(result)
    assert document["state_bytes"] == 153_944_064
    assert document["kv_bytes_per_token"] == 65_536
    assert document["offloaded"][0]["batch_limit"] == "states"


def test_states_that_fill_the_compute_device_are_the_reason(
    qwen36_27b: ModelShape, catalogue: Catalogue
) -> None:
    offload, load = _offload(catalogue, 4), replace(_load(8192), prefill="none")
    node = replace(offload.memory.device, attention_only=True)
    offload = replace(offload, memory=DeviceCount(node, 4))
    result = compare(Question(qwen36_27b, offload, load))
    reason = "Do not offload, because the recurrent states of 59 requests fill 1xH100"
    assert result.verdict.startswith(reason)


def test_states_are_not_named_where_there_are_none(
    shapes: dict[str, ModelShape], catalogue: Catalogue
) -> None:
    result = _compare(shapes["llama-3-8b"], catalogue, 2)
    assert "state" not in format_comparison(result)
    assert comparison_json(result)["state_bytes"] == 0


def test_states_that_do_not_fit_are_refused(
    qwen36_27b: ModelShape, catalogue: Catalogue
) -> None:
    """Weights leave 0.2 GB of the compute device, less than one request's states."""
    tight = replace(qwen36_27b, dense_bytes=0.9 * 80e9 - 0.2e9, embedding_bytes=0)
    with pytest.raises(DoesNotFitError) as caught:
        evaluate_offload(tight, _offload(catalogue, 2), _load(8192), None)
    text = str(caught.value)
    assert "0.2 GB are left for recurrent states, one request takes 0.31 GB" in text
    assert "the states limit is 0. Use more memory on the compute devices" in text


def test_steps_with_states_run_whole(
    qwen36_27b: ModelShape, catalogue: Catalogue
) -> None:
    """As the runner keeps them: two micro-batches would have to share the states."""
    result = _compare(qwen36_27b, catalogue, 2)
    assert result.question.num_micro_batches == 2
    assert [e.num_micro_batches for e in result.offloaded] == [1]
    assert result.refused == ()
    assert any("run whole, in 1 micro-batch" in note for note in result.notes)
    with pytest.raises(DoesNotFitError, match=r"^2 micro-batches .* run whole"):
        evaluate_offload(qwen36_27b, _offload(catalogue, 2), _load(8192), None, 2)
