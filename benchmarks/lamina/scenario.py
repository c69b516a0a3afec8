# SPDX-License-Identifier: Apache-2.0
"""Event simulator: engines replay a trace, alone or on shared memory nodes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lamina.conditions import Failures, SimulationConfig
from lamina.engine import Engine, MemoryPool, StepModel
from lamina.result import SimulationResult, summarize

from vllm_attn_offload.planner.estimate.deployment import DoesNotFitError
from vllm_attn_offload.planner.estimate.engine_times import EngineTimes
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.traces import Request
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.model.shape import ModelShape

UNLIMITED = 1 << 30


def simulate_offload(
    shape: ModelShape,
    offload: Offload,
    workload: Workload,
    requests: Sequence[Request],
    num_micro_batches: int = 1,
    num_engines: int = 1,
    failures: Failures | None = None,
) -> SimulationResult:
    """Replay `requests` on `num_engines` engines that share the memory nodes.

    Args:
        offload: Its compute devices are those of *one* engine.
        failures: Of the memory nodes.

    Raises:
        DoesNotFitError: No request fits.
    """
    engine = EngineTimes(
        shape,
        offload.compute,
        offload,
        num_micro_batches=num_micro_batches,
        prefills=workload.prefill == "local",
    )
    config = SimulationConfig(
        kv_tokens=_kv_tokens(shape, engine.kv_budget / num_engines, workload),
        num_nodes=offload.memory.count,
        max_num_seqs=workload.max_batch or UNLIMITED,
        max_batched_tokens=_token_budget(workload),
        # Contention is read once per chunk: keep chunks short where there is any.
        max_chunk=1024 if num_engines == 1 else 32,
        failures=failures or Failures(),
    )
    return simulate(requests, engine, config, num_engines, shares_memory=True)


def simulate_homogeneous(
    shape: ModelShape,
    devices: DeviceCount,
    replicas: int,
    workload: Workload,
    requests: Sequence[Request],
) -> SimulationResult:
    """Replay `requests` on `replicas` independent engines of `devices` each.

    Raises:
        DoesNotFitError: The weights leave no room, or no request fits.
    """
    engine = EngineTimes(shape, devices, prefills=workload.prefill == "local")
    if engine.kv_budget <= 0:
        raise DoesNotFitError(
            f"{devices} cannot hold {shape.name}. Its weights take "
            f"{shape.weight_bytes / 1e9:.1f} GB. Use more devices."
        )
    config = SimulationConfig(
        kv_tokens=_kv_tokens(shape, engine.kv_budget, workload),
        max_num_seqs=workload.max_batch or UNLIMITED,
        max_batched_tokens=_token_budget(workload),
    )
    return simulate(requests, engine, config, replicas)


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


def _token_budget(workload: Workload) -> int:
    """vLLM's usual budget of a step; KV that arrives ready-made has none."""
    return 8192 if workload.prefill == "local" else UNLIMITED


def _kv_tokens(shape: ModelShape, budget: float, workload: Workload) -> int:
    """Tokens of KV; windowed layers hold less per token at the mean context."""
    return int(budget / (shape.kv_bytes(workload.context) / workload.context))
