# SPDX-License-Identifier: Apache-2.0
"""Event simulator: engines replay a trace, alone or on shared memory nodes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_attn_offload.planner.estimate.deployment import DoesNotFitError
from vllm_attn_offload.planner.simulate.engine import (
    Engine,
    SimulationConfig,
    StepModel,
)
from vllm_attn_offload.planner.simulate.memory_pool import MemoryPool
from vllm_attn_offload.planner.simulate.traces import Request


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


def simulate(
    requests: Sequence[Request],
    model: StepModel,
    config: SimulationConfig,
    num_engines: int = 1,
    shares_memory: bool = False,
) -> SimulationResult:
    """Replay `requests`, dealt out in turn to `num_engines` equal engines.

    Args:
        shares_memory: the engines use the same memory nodes; `config.kv_tokens` is
            each engine's part, and their attention contends.

    Raises:
        DoesNotFitError: no request fits the KV capacity.
    """
    pool = MemoryPool()
    engines = [
        Engine(
            i,
            requests[i::num_engines],
            model,
            config,
            pool if shares_memory else MemoryPool(),
        )
        for i in range(num_engines)
    ]
    queue = [(engine.now, engine.index) for engine in engines if not engine.is_done]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        engine = engines[index]
        engine.advance()
        if engine.is_done:
            engine.pool.report(index, 0.0, 0.0)
        else:
            heapq.heappush(queue, (engine.now, index))
    return _summarize(requests, engines, config, shares_memory)


def _summarize(
    requests: Sequence[Request],
    engines: Sequence[Engine],
    config: SimulationConfig,
    shares_memory: bool,
) -> SimulationResult:
    stats = [engine.stats for engine in engines]
    finished = sum(s.finished for s in stats)
    if finished == 0:
        raise DoesNotFitError(
            f"No request of the trace fits {config.kv_tokens:,} tokens of KV. The "
            "longest prompt plus output must fit. Use more memory."
        )
    makespan = max(s.end_s for s in stats) - requests[0].arrival_s
    times = np.array([t for s in stats for t, _ in s.tbt])
    weights = np.array([w for s in stats for _, w in s.tbt])
    ttft = np.array([t for s in stats for t in s.ttft_s])
    pools = 1 if shares_memory else len(engines)
    busy = sum(s.busy_s for s in stats)
    return SimulationResult(
        tokens_per_s=sum(s.generated for s in stats) / makespan,
        loaded_tokens_per_s=sum(s.loaded_tokens / (s.loaded_s or 1) for s in stats),
        mean_batch=sum(s.batch_seconds for s in stats) / busy * len(engines),
        tbt_p50_s=_weighted_percentile(times, weights, 0.50),
        tbt_p99_s=_weighted_percentile(times, weights, 0.99),
        ttft_p50_s=float(np.quantile(ttft, 0.50)),
        ttft_p99_s=float(np.quantile(ttft, 0.99)),
        num_finished=finished,
        num_refused=sum(s.refused for s in stats),
        num_preemptions=sum(s.preemptions for s in stats),
        kv_peak_share=max(s.kv_peak_tokens for s in stats) / config.kv_tokens,
        memory_utilization=sum(e.memory_busy_s for e in engines) / (makespan * pools),
        makespan_s=makespan,
    )


def _weighted_percentile(
    values: np.ndarray, weights: np.ndarray, share: float
) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    i = int(np.searchsorted(reached, share * reached[-1]))
    return float(values[order[i]])
