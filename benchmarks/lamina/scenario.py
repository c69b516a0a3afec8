# SPDX-License-Identifier: Apache-2.0
"""Simulate one deployment over a trace: with memory nodes, or homogeneous devices."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.conditions import Failures, SimulationConfig
from lamina.result import SimulationResult
from lamina.simulator import simulate

from vllm_attn_offload.planner.estimate.engine_times import EngineTimes
from vllm_attn_offload.planner.estimate.estimate import DoesNotFitError
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


def _token_budget(workload: Workload) -> int:
    """vLLM's usual budget of a step; KV that arrives ready-made has none."""
    return 8192 if workload.prefill == "local" else UNLIMITED


def _kv_tokens(shape: ModelShape, budget: float, workload: Workload) -> int:
    """Tokens of KV; windowed layers hold less per token at the mean context."""
    return int(budget / (shape.kv_bytes(workload.context) / workload.context))
