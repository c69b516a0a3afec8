# SPDX-License-Identifier: Apache-2.0
"""Event simulator: engines replay a trace, alone or on shared memory nodes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lamina.conditions import SimulationConfig
from lamina.engine import Engine, MemoryPool, StepModel
from lamina.result import SimulationResult, summarize

from vllm_attn_offload.planner.estimate.traces import Request


def simulate(
    requests: Sequence[Request],
    model: StepModel,
    config: SimulationConfig,
    num_engines: int = 1,
    shares_memory: bool = False,
) -> SimulationResult:
    """Replay `requests`, dealt out in turn to `num_engines` equal engines.

    Args:
        shares_memory: The engines use the same memory nodes; `config.kv_tokens` is
            each engine's part, and their attention contends.

    Raises:
        DoesNotFitError: No request fits the KV capacity.
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
    stats = [engine.stats for engine in engines]
    num_pools = 1 if shares_memory else num_engines
    return summarize(stats, requests[0].arrival_s, config.kv_tokens, num_pools)
