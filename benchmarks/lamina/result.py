# SPDX-License-Identifier: Apache-2.0
"""Results of a simulation: counters of the engines, and their summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_attn_offload.planner.estimate.deployment import DoesNotFitError


@dataclass(slots=True)
class EngineStats:
    """Counters of one engine; `tbt` holds (seconds of a step, tokens at that pace)."""

    generated: int = 0
    finished: int = 0
    preemptions: int = 0
    refused: int = 0
    busy_s: float = 0.0
    batch_seconds: float = 0.0
    kv_peak_tokens: int = 0
    end_s: float = 0.0
    loaded_s: float = 0.0
    loaded_tokens: int = 0
    memory_busy_s: float = 0.0
    tbt: list[tuple[float, int]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """All engines together. TBT percentiles weigh every generated token once.

    `loaded_tokens_per_s` leaves out idle time and the end, when the last long requests
    run in a shrinking batch.
    """

    tokens_per_s: float
    loaded_tokens_per_s: float
    mean_batch: float
    tbt_p50_s: float
    tbt_p99_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    num_finished: int
    num_refused: int
    num_preemptions: int
    kv_peak_share: float
    memory_utilization: float
    makespan_s: float


def summarize(
    stats: Sequence[EngineStats], start_s: float, kv_tokens: int, num_pools: int
) -> SimulationResult:
    """All engines together.

    Args:
        start_s: Arrival of the first request.
        kv_tokens: KV capacity of one engine.
        num_pools: Sets of memory nodes.

    Raises:
        DoesNotFitError: No request fits the KV capacity.
    """
    finished = sum(s.finished for s in stats)
    if finished == 0:
        raise DoesNotFitError(
            f"No request of the trace fits {kv_tokens:,} tokens of KV. The "
            "longest prompt plus output must fit. Use more memory."
        )
    makespan = max(s.end_s for s in stats) - start_s
    times = np.array([t for s in stats for t, _ in s.tbt])
    weights = np.array([w for s in stats for _, w in s.tbt])
    ttft = np.array([t for s in stats for t in s.ttft_s])
    busy = sum(s.busy_s for s in stats)
    return SimulationResult(
        tokens_per_s=sum(s.generated for s in stats) / makespan,
        loaded_tokens_per_s=sum(s.loaded_tokens / (s.loaded_s or 1) for s in stats),
        mean_batch=sum(s.batch_seconds for s in stats) / busy * len(stats),
        tbt_p50_s=_weighted_percentile(times, weights, 0.50),
        tbt_p99_s=_weighted_percentile(times, weights, 0.99),
        ttft_p50_s=float(np.quantile(ttft, 0.50)),
        ttft_p99_s=float(np.quantile(ttft, 0.99)),
        num_finished=finished,
        num_refused=sum(s.refused for s in stats),
        num_preemptions=sum(s.preemptions for s in stats),
        kv_peak_share=max(s.kv_peak_tokens for s in stats) / kv_tokens,
        memory_utilization=sum(s.memory_busy_s for s in stats) / makespan / num_pools,
        makespan_s=makespan,
    )


def _weighted_percentile(
    values: np.ndarray, weights: np.ndarray, share: float
) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    i = int(np.searchsorted(reached, share * reached[-1]))
    return float(values[order[i]])
