# SPDX-License-Identifier: Apache-2.0
"""Simulate the deployments of a comparison over its trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.compare import Comparison
from vllm_attn_offload.planner.estimate.deployment import (
    DoesNotFitError,
    Estimate,
    Offload,
    Workload,
)
from vllm_attn_offload.planner.hardware import DeviceGroup
from vllm_attn_offload.planner.model.shape import ModelShape
from vllm_attn_offload.planner.report import format_table
from vllm_attn_offload.planner.simulate.engine import SimulationConfig
from vllm_attn_offload.planner.simulate.failures import Failures
from vllm_attn_offload.planner.simulate.simulator import SimulationResult, simulate
from vllm_attn_offload.planner.simulate.traces import Request


@dataclass(slots=True)
class OffloadSteps:
    """Step times of one engine with memory nodes."""

    shape: ModelShape
    offload: Offload
    num_batches: int = 1
    prefills: bool = True
    _model: dict[tuple[int, int], float] = field(default_factory=dict)
    _partition: str = ""

    def decode(
        self, batch: int, context: float, num_batches: int
    ) -> tuple[float, float, float]:
        """Model, attention and wire time of one of `num_batches` micro-batches."""
        compute, memory = self.offload.compute, self.offload.memory
        rows = batch / num_batches
        tp = compute.count // max(num_batches - 1, 1)
        key = batch, num_batches
        if key not in self._model:
            self._partition = self.offload.resolved_partition(self.shape)
            self._model[key] = cost.layers_time(self.shape, compute.device, tp, rows)
        ports = min(compute.count, memory.count)
        return (
            self._model[key],
            cost.attention_time(self.shape, memory.device, memory.count, rows, context),
            cost.wire_time(
                self.shape,
                self.offload.network,
                rows,
                memory.count,
                ports,
                self._partition,
            ),
        )

    def overhead(self, batch: int) -> float:
        """Output head, sampling and scheduling."""
        compute = self.offload.compute
        tp = compute.count // max(self.num_batches - 1, 1)
        return cost.overhead_time(self.shape, compute.device, tp, batch)

    def prefill(self, tokens: float, context: float) -> float:
        """Prefill of `tokens` at a mean `context`; 0 when it runs elsewhere."""
        if not self.prefills:
            return 0.0
        compute = self.offload.compute
        return cost.prefill_time(
            self.shape, compute.device, compute.count, tokens, context
        )


@dataclass(slots=True)
class HomogeneousSteps:
    """Step times of one engine that keeps its own KV cache."""

    shape: ModelShape
    group: DeviceGroup
    prefills: bool = True
    num_batches: int = 1
    _model: dict[int, float] = field(default_factory=dict)

    def decode(
        self, batch: int, context: float, num_batches: int
    ) -> tuple[float, float, float]:
        """Model and attention time; no wire."""
        device, tp = self.group.device, self.group.count
        if batch not in self._model:
            self._model[batch] = cost.layers_time(self.shape, device, tp, batch)
        attention = cost.attention_time(self.shape, device, tp, batch, context)
        return self._model[batch], attention, 0.0

    def overhead(self, batch: int) -> float:
        """Output head, sampling and scheduling."""
        device, tp = self.group.device, self.group.count
        return cost.overhead_time(self.shape, device, tp, batch)

    def prefill(self, tokens: float, context: float) -> float:
        """Prefill of `tokens` at a mean `context`; 0 when it runs elsewhere."""
        if not self.prefills:
            return 0.0
        device, tp = self.group.device, self.group.count
        return cost.prefill_time(self.shape, device, tp, tokens, context)


def simulate_offload(
    shape: ModelShape,
    offload: Offload,
    workload: Workload,
    requests: Sequence[Request],
    num_batches: int = 1,
    num_engines: int = 1,
    failures: Failures | None = None,
) -> SimulationResult:
    """Replay `requests` on `num_engines` engines that share the memory nodes."""
    budget = cost.memory_budget(offload.memory.device, offload.memory.count)
    config = SimulationConfig(
        kv_tokens=_kv_tokens(shape, budget / num_engines, workload),
        num_nodes=offload.memory.count,
        max_num_seqs=workload.max_batch or 1 << 30,
        max_batched_tokens=_token_budget(workload),
        # Contention is read once per chunk: keep chunks short where there is any.
        max_chunk=1024 if num_engines == 1 else 32,
        failures=failures or Failures(),
    )
    steps = OffloadSteps(shape, offload, num_batches, workload.prefill == "local")
    return simulate(requests, steps, config, num_engines, shares_memory=True)


def simulate_homogeneous(
    shape: ModelShape,
    group: DeviceGroup,
    replicas: int,
    workload: Workload,
    requests: Sequence[Request],
) -> SimulationResult:
    """Replay `requests` on `replicas` independent tensor-parallel groups.

    Raises:
        DoesNotFitError: the weights leave no room.
    """
    budget = cost.memory_budget(group.device, group.count) - shape.weight_bytes
    if budget <= 0:
        raise DoesNotFitError(
            f"{group} cannot hold {shape.name}. Its weights take "
            f"{shape.weight_bytes / 1e9:.1f} GB. Use more devices."
        )
    config = SimulationConfig(
        kv_tokens=_kv_tokens(shape, budget, workload),
        max_num_seqs=workload.max_batch or 1 << 30,
        max_batched_tokens=_token_budget(workload),
    )
    steps = HomogeneousSteps(shape, group, workload.prefill == "local")
    return simulate(requests, steps, config, replicas)


def _token_budget(workload: Workload) -> int:
    """vLLM's usual budget of a step; KV that arrives ready-made has none."""
    return 8192 if workload.prefill == "local" else 1 << 30


def _kv_tokens(shape: ModelShape, budget: float, workload: Workload) -> int:
    """Tokens of KV; windowed layers hold less per token at the mean context."""
    return int(budget / (shape.kv_bytes(workload.context) / workload.context))


def simulate_comparison(
    offload: Offload,
    workload: Workload,
    requests: Sequence[Request],
    result: Comparison,
    failures: Failures,
) -> tuple[str, dict[str, Any]]:
    """Table and JSON facts: each deployment replays the trace as it was recorded.

    `failures` happen to memory nodes only.
    """
    shape = result.shape
    runs: dict[str, SimulationResult] = {}
    refused: list[str] = []
    for e in result.offloaded:
        engine = replace(offload, compute=_per_engine(offload.compute, e))
        attempt = partial(simulate_offload, shape, engine, workload, requests)
        label = f"{e.label}, n={e.num_batches}"
        _try(
            label, partial(attempt, e.num_batches, e.replicas, failures), runs, refused
        )
    for e in result.alternatives:
        group = _per_engine(_group(e, offload), e)
        attempt = partial(simulate_homogeneous, shape, group, e.replicas)
        _try(e.label, partial(attempt, workload, requests), runs, refused)
    hours = requests[-1].arrival_s / 3600
    title = f"Trace of {len(requests):,} requests over {hours:.2f} hours, replayed:"
    facts = {label: asdict(r) for label, r in runs.items()}
    return "\n".join([title, _table(runs), *refused]), facts


def _try(
    label: str,
    attempt: Callable[[], SimulationResult],
    runs: dict[str, SimulationResult],
    refused: list[str],
) -> None:
    try:
        runs[label] = attempt()
    except DoesNotFitError as error:
        refused.append(f"{label}: {error}")


def _table(runs: Mapping[str, SimulationResult]) -> str:
    header = ["Simulated", "Tokens/s", "Batch", "TBT p50/p99 ms", "TTFT p50/p99 s"]
    header += ["Preempted", "KV peak", "Hours"]
    rows = [
        [label, f"{r.tokens_per_s:,.0f}", f"{r.mean_batch:,.0f}"]
        + [f"{r.tbt_p50_s * 1e3:.0f} / {r.tbt_p99_s * 1e3:.0f}"]
        + [f"{r.ttft_p50_s:.1f} / {r.ttft_p99_s:.1f}", f"{r.num_preemptions:,}"]
        + [f"{r.kv_peak_share:.0%}", f"{r.makespan_s / 3600:.2f}"]
        for label, r in runs.items()
    ]
    return format_table(header, rows)


def _group(estimate: Estimate, offload: Offload) -> DeviceGroup:
    """The devices of a homogeneous estimate, from its label `COUNTxNAME`."""
    count, _, name = estimate.label.partition("x")
    devices = (offload.compute.device, offload.memory.device)
    return DeviceGroup(next(d for d in devices if d.name == name), int(count))


def _per_engine(group: DeviceGroup, estimate: Estimate) -> DeviceGroup:
    return replace(group, count=group.count // estimate.replicas)
