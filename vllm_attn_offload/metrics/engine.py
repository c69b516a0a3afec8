# SPDX-License-Identifier: Apache-2.0
"""Metrics of an engine whose KV pool is on memory nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric

from vllm_attn_offload.metrics.engine_state import EngineState
from vllm_attn_offload.metrics.metric import Kind, OffloadMetric, Unit

# Name, help, unit, field of EngineState.
_FIELDS: tuple[tuple[Kind, str, str, Unit, str], ...] = (
    (
        "gauge",
        "generation",
        "Which of the engine's sessions are in use on its memory nodes; each recovery "
        "opens new ones.",
        "count",
        "generation",
    ),
    (
        "gauge",
        "recovering",
        "1 from the loss of a memory node until all nodes are back, else 0.",
        "bool",
        "is_recovering",
    ),
    (
        "counter",
        "recoveries",
        "Losses of memory nodes after which the engine went on; counted with the first "
        "step after one.",
        "count",
        "num_recoveries",
    ),
    (
        "counter",
        "recovery_seconds",
        "Time from losses of memory nodes until the engine computed again, or could.",
        "seconds",
        "recovery_s",
    ),
    (
        "gauge",
        "last_recovery_seconds",
        "Time that the last recovery took; 0: there was none.",
        "seconds",
        "last_recovery_s",
    ),
    (
        "counter",
        "recomputed_tokens",
        "Tokens of running requests that losses of memory nodes made the engine "
        "compute again.",
        "count",
        "num_recomputed_tokens",
    ),
    (
        "gauge",
        "pool_blocks",
        "KV blocks that the engine schedules with; its memory nodes hold them.",
        "count",
        "num_pool_blocks",
    ),
)
ENGINE_METRICS = tuple(
    OffloadMetric(
        f"attn_offload:engine_{name}",
        kind,
        ("model_name", "engine_index"),
        text,
        unit,
        field,
    )
    for kind, name, text, unit, field in _FIELDS
)


def engine_families(states: Iterable[EngineState]) -> Iterator[Metric]:
    """Yield the families of these engines."""
    sources = [((each.model_name, str(each.engine_index)), each) for each in states]
    for metric in ENGINE_METRICS:
        yield metric.of_sources(sources)
