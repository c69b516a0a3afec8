# SPDX-License-Identifier: Apache-2.0
"""Metrics and traces of two engines behind two API servers, whichever answers."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
from harness import faults, tiny_llama
from harness.serve_process import ServeProcess
from node_process import eventually
from prometheus_client.parser import text_string_to_metric_families
from span_receiver import SpanReceiver, attributes, span_receiver

from vllm_attn_offload.metrics.catalogue import ALL_METRICS
from vllm_attn_offload.metrics.engine import ENGINE_METRICS
from vllm_attn_offload.metrics.node import CERTIFICATE

NUM_TOKENS = 150
NUM_ENGINES = 2
DEADLINE_S = 240.0
PROMPTS = tiny_llama.PROMPTS * 2
#: Each is answered by either server.
NUM_SCRAPES = 12
STARTS = ("attn_offload.join", "attn_offload.reserve", "attn_offload.open")
ENGINE = "attn_offload:engine_"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def receiver() -> Iterator[SpanReceiver]:
    with span_receiver() as running:
        yield running


@pytest.fixture(scope="module")
def server(
    tiny_model: str, receiver: SpanReceiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProcess]:
    # As many API servers as engines, unless somebody asks for another number.
    process = ServeProcess(
        tiny_model,
        tmp_path_factory.mktemp("serve") / "serve.log",
        *("--attention-offload", "--attention-offload-config"),
        json.dumps({"kv_cache_gib": 0.1}),
        *("--data-parallel-size", str(NUM_ENGINES), "--enforce-eager"),
        *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--skip-tokenizer-init"),
        *("--dtype", "float32", "--otlp-traces-endpoint", receiver.url),
        # Not "auto", which wants a core for each rank.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        **receiver.variables,
    )
    yield process
    process.kill_all()


def answers(server: ServeProcess) -> list[list[int]]:
    streams = faults.Streams(server.url, server.model, PROMPTS, NUM_TOKENS)
    return streams.finish(DEADLINE_S)


def scrape(server: ServeProcess) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Labels and values by name."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def by_engine(server: ServeProcess, name: str) -> list[float]:
    """Values of both engines, in their order."""
    samples = scrape(server)[ENGINE + name]
    return [v for _, v in sorted(samples, key=lambda each: each[0]["engine_index"])]


def test_both_show_the_same(server: ServeProcess) -> None:
    """All that there is, of both engines and their nodes."""
    answers(server)
    shown = [scrape(server) for _ in range(NUM_SCRAPES)]
    for each in shown:
        for metric in ALL_METRICS:
            if metric.sample != CERTIFICATE.sample:  # without TLS
                samples = each[metric.sample]
                assert len({tuple(labels.items()) for labels, _ in samples}) >= 2
                assert {tuple(sorted(labels)) for labels, _ in samples} == {
                    tuple(sorted(metric.labels))
                }
        assert sum(v for _, v in each["vllm:generation_tokens_total"]) == (
            len(PROMPTS) * NUM_TOKENS
        )
        names = {labels["engine_index"] for labels, _ in each[ENGINE + "generation"]}
        assert names == {"0", "1"}
        models = {
            labels["model_name"]
            for name in ("engine_generation", "session_info")
            for labels, _ in each[f"attn_offload:{name}"]
        }
        assert models == {server.model}
        assert all(v > 0 for _, v in each["attn_offload:compute_wait_seconds_total"])
    for name in ("bytes_sent_total", *(m.sample.split(":")[1] for m in ENGINE_METRICS)):
        first, *others = (each[f"attn_offload:{name}"] for each in shown)
        assert all(other == first for other in others)


def test_start_and_steps_are_traced(
    server: ServeProcess, receiver: SpanReceiver
) -> None:
    """Within vLLM's own spans, where it has begun to trace the engine's process."""
    spans = {name: receiver.named(name) for name in STARTS}
    assert all(len(found) == NUM_ENGINES for found in spans.values())
    assert all(s.parent_span_id for name in STARTS[1:] for s in spans[name])
    answers(server)
    assert eventually(lambda: len(receiver.named("attn_offload.step")) > 2, 30)
    for span in receiver.named("attn_offload.step"):
        step = attributes(span)
        assert step["attn_offload.layer_calls"] in (2, 4)  # of two layers, or halves
        assert step["attn_offload.tokens"] >= step["attn_offload.requests"] > 0
        seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert 0 < step["attn_offload.wait_s"] < seconds


def test_recovery_is_counted_and_traced(
    server: ServeProcess, receiver: SpanReceiver
) -> None:
    """Of the engine that lost its node, and of no other."""
    undisturbed = answers(server)
    assert by_engine(server, "recoveries_total") == [0, 0]
    streams = faults.Streams(server.url, server.model, PROMPTS, NUM_TOKENS)
    assert streams.wait_for(len(PROMPTS) * NUM_TOKENS // 4, DEADLINE_S)
    faults.kill(faults.memory_nodes(server.process.pid)[1])
    assert streams.finish(DEADLINE_S) == undisturbed
    assert answers(server) == undisturbed
    assert by_engine(server, "recoveries_total") == [0, 1]
    undisturbed_engine, engine = by_engine(server, "generation")
    # Every attempt to open sessions again has its own.
    assert undisturbed_engine == 0 < engine
    assert by_engine(server, "recovering") == [0, 0]
    lasted_s = by_engine(server, "recovery_seconds_total")[1]
    assert 0 < lasted_s == by_engine(server, "last_recovery_seconds")[1]

    assert eventually(lambda: receiver.named("attn_offload.recovery"), 30)
    (span,) = receiver.named("attn_offload.recovery")
    shown = attributes(span)
    assert shown["attn_offload.node"].endswith("-1-0/sock")
    # Whichever notices first, the step or the channel, tells it in its own words.
    assert "was lost" in shown["attn_offload.cause"]
    assert shown["attn_offload.seconds"] == pytest.approx(lasted_s)
    tokens = by_engine(server, "recomputed_tokens_total")
    assert [0, shown["attn_offload.recomputed_tokens"]] == tokens
    assert not span.parent_span_id
    assert eventually(lambda: len(receiver.children(span)) == 3, 30)
    parts = receiver.children(span)
    assert set(parts) == {
        f"attn_offload.recovery.{part}" for part in ("lost", "reopened", "attached")
    }
    assert max(part.end_time_unix_nano for part in parts.values()) == pytest.approx(
        span.end_time_unix_nano, abs=1e6
    )


def test_ends_on_interrupt(server: ServeProcess) -> None:
    assert server.end(signal.SIGINT) == []
