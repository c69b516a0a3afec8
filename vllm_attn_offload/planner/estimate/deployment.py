# SPDX-License-Identifier: Apache-2.0
"""Evaluate one deployment: with memory nodes, or homogeneous devices of one kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.hardware import DeviceGroup, Network
from vllm_attn_offload.planner.model.shape import ModelShape

PARTITIONS = ("auto", "heads", "blocks")


@dataclass(frozen=True, slots=True)
class Workload:
    """Mean request: `context` cached tokens per decode step, prompt and output tokens.

    `prefill` is "local" (the compute devices also prefill) or "none" (elsewhere, as in
    Lamina's evaluation). `slo_tbt_s` bounds the time between tokens.
    """

    context: float
    prompt: float
    output: float
    prefill: str = "local"
    slo_tbt_s: float | None = None
    max_batch: int | None = None


@dataclass(frozen=True, slots=True)
class Offload:
    """Compute devices of one or more engines, and memory nodes; a network port each."""

    compute: DeviceGroup
    memory: DeviceGroup
    network: Network
    partition: str = "auto"

    def resolved_partition(self, shape: ModelShape) -> str:
        """Head partition where it divides evenly, else block partition.

        Raises:
            ValueError: head partition was asked for and does not divide.
        """
        kv_heads = min(group.num_kv_heads for group in shape.groups)
        even = kv_heads % self.memory.count == 0
        if self.partition == "heads" and not even:
            allowed = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
            raise ValueError(
                f"{self.memory.count} memory nodes cannot split {kv_heads} KV heads "
                f"evenly. Allowed: {', '.join(map(str, allowed))}. Use one of these, "
                "or --partition blocks."
            )
        if self.partition == "auto":
            return "heads" if even else "blocks"
        return self.partition


@dataclass(frozen=True, slots=True)
class Estimate:
    """Steady state at one batch size: `batch` requests over `replicas` engines.

    Times are of one micro-batch of one engine, in seconds; `overhead_s` is of a whole
    step. Without a price both USD fields are None.
    """

    label: str
    batch: int
    num_devices: int
    replicas: int
    num_batches: int
    overhead_s: float
    model_s: float
    attention_s: float
    wire_s: float
    tbt_s: float
    decode_tokens_per_s: float
    prefill_share: float
    tokens_per_s: float
    usd_per_hour: float | None
    usd_per_mtoken: float | None
    batch_limit: str
    bottleneck: str

    @property
    def cost_per_token(self) -> float:
        """What deployments are ranked by: USD, or device hours where a price lacks."""
        paid = self.num_devices if self.usd_per_hour is None else self.usd_per_hour
        return paid / self.tokens_per_s


class DoesNotFitError(ValueError):
    """The weights, or the KV of one request, exceed the devices' memory."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One of `replicas` engines before its batch is chosen.

    `step` maps rows to t_m, t_a and t_w, `overhead` rows to what no micro-batch hides;
    `usd_per_hour` and `num_devices` are of all replicas.
    """

    label: str
    num_devices: int
    step: Callable[[float], tuple[float, float, float]]
    overhead: Callable[[float], float]
    kv_budget: float
    prefill_s: float
    usd_per_hour: float | None
    num_batches: int = 1
    replicas: int = 1

    def tbt(self, batch: int) -> float:
        """Time between tokens in seconds."""
        n = self.num_batches
        return cost.step_time(*self.step(batch / n), n) + self.overhead(batch)


def evaluate_offload(
    shape: ModelShape,
    offload: Offload,
    workload: Workload,
    usd_per_hour: float | None,
    num_batches: int = 1,
) -> Estimate:
    """Best split of the compute devices into engines that share the memory nodes.

    Raises:
        DoesNotFitError: weights exceed every split, or no request fits.
        ValueError: impossible partition.
    """

    def attempt(tp: int, replicas: int) -> Estimate:
        return _evaluate_engine(
            shape, offload, tp, replicas, workload, usd_per_hour, num_batches
        )

    return _best_split(attempt, offload.compute.count)


def _best_split(attempt: Callable[[int, int], Estimate], count: int) -> Estimate:
    """The fastest of all splits of `count` devices into equal tensor-parallel groups.

    What does not fit the largest group fits no smaller one, so its reason is given.
    """
    found: list[Estimate] = []
    reason = DoesNotFitError("")
    for tp in (t for t in range(1, count + 1) if count % t == 0):
        try:
            found.append(attempt(tp, count // tp))
        except DoesNotFitError as error:
            reason = error
    if not found:
        raise reason
    return max(found, key=lambda estimate: estimate.tokens_per_s)


def _evaluate_engine(
    shape: ModelShape,
    offload: Offload,
    tp: int,
    replicas: int,
    workload: Workload,
    usd_per_hour: float | None,
    num_batches: int,
) -> Estimate:
    """One of `replicas` engines, with its share of the memory nodes, scaled up."""
    compute, network = offload.compute.device, offload.network
    rotating = _model_replica_size(tp, num_batches)
    _check_engine(shape, DeviceGroup(compute, rotating))
    partition = offload.resolved_partition(shape)
    memory, nodes = offload.memory.device, offload.memory.count
    share, ports = nodes / replicas, min(tp, nodes / replicas)

    def step(rows: float) -> tuple[float, float, float]:
        return (
            cost.layers_time(shape, compute, rotating, rows),
            cost.attention_time(shape, memory, share, rows, workload.context),
            cost.wire_time(shape, network, rows, nodes, ports, partition),
        )

    prefill = cost.prefill_time(shape, compute, tp, workload.prompt)
    ship = shape.kv_bytes(workload.prompt) / (network.bytes_per_s * ports)
    candidate = _Candidate(
        label=f"{offload.compute} + {offload.memory}",
        num_devices=offload.compute.count + nodes,
        step=step,
        overhead=partial(cost.overhead_time, shape, compute, rotating),
        kv_budget=cost.memory_budget(memory, share),
        prefill_s=max(prefill, ship),
        usd_per_hour=usd_per_hour,
        num_batches=num_batches,
        replicas=replicas,
    )
    return _best(shape, workload, candidate)


def _model_replica_size(tp: int, num_batches: int) -> int:
    """Devices of each of the n - 1 model replicas that n micro-batches rotate over."""
    replicas = max(num_batches - 1, 1)
    if tp % replicas:
        raise DoesNotFitError(
            f"{num_batches} micro-batches rotate over {replicas} model replicas. {tp} "
            "compute devices do not split into these. Use fewer micro-batches."
        )
    return tp // replicas


def evaluate_homogeneous(
    shape: ModelShape,
    group: DeviceGroup,
    workload: Workload,
    usd_per_hour: float | None,
) -> Estimate:
    """Best split of one kind of device into equal tensor-parallel replicas.

    Raises:
        DoesNotFitError: no split holds the weights and one request.
    """
    device = group.device

    def attempt(tp: int, replicas: int) -> Estimate:
        _check_engine(shape, DeviceGroup(device, tp))

        def step(rows: float) -> tuple[float, float, float]:
            attention = cost.attention_time(shape, device, tp, rows, workload.context)
            return cost.layers_time(shape, device, tp, rows), attention, 0.0

        candidate = _Candidate(
            label=str(group),
            num_devices=group.count,
            step=step,
            overhead=partial(cost.overhead_time, shape, device, tp),
            kv_budget=cost.memory_budget(device, tp) - shape.weight_bytes,
            prefill_s=cost.prefill_time(shape, device, tp, workload.prompt),
            usd_per_hour=usd_per_hour,
            replicas=replicas,
        )
        return _best(shape, workload, candidate)

    return _best_split(attempt, group.count)


def _check_engine(shape: ModelShape, group: DeviceGroup) -> None:
    """Query heads must split evenly, and the weights must fit."""
    heads = [layer.num_heads for layer in shape.groups]
    if any(n % group.count for n in heads):
        raise DoesNotFitError(
            f"{shape.name} cannot run tensor-parallel on {group}: its {min(heads)} "
            f"query heads do not split evenly. The count must divide {min(heads)}. Use "
            "another number of devices."
        )
    usable = cost.memory_budget(group.device, 1)
    if shape.weight_bytes >= usable * group.count:
        raise DoesNotFitError(
            f"The {shape.weight_bytes / 1e9:.1f} GB of weights of {shape.name} do not "
            f"fit {group} ({group.count * usable / 1e9:.1f} GB usable). At least "
            f"{int(shape.weight_bytes // usable) + 1}x{group.device.name} are needed. "
            "Use more or larger devices, or fewer bits per weight."
        )


def _best(shape: ModelShape, workload: Workload, c: _Candidate) -> Estimate:
    """The largest batch that capacity, the SLO and the user allow."""
    batch, batch_limit = _choose_batch(shape, workload, c)
    model_s, attention_s, wire_s = c.step(batch / c.num_batches)
    tbt_s = c.tbt(batch)
    decode = batch / tbt_s * c.replicas
    prefill_s = c.prefill_s / workload.output / c.replicas
    if workload.prefill != "local":
        prefill_s = 0.0
    tokens_per_s = 1 / (1 / decode + prefill_s)
    return Estimate(
        label=c.label,
        batch=batch * c.replicas,
        num_devices=c.num_devices,
        replicas=c.replicas,
        num_batches=c.num_batches,
        overhead_s=c.overhead(batch),
        model_s=model_s,
        attention_s=attention_s,
        wire_s=wire_s,
        tbt_s=tbt_s,
        decode_tokens_per_s=decode,
        prefill_share=prefill_s * tokens_per_s,
        tokens_per_s=tokens_per_s,
        usd_per_hour=c.usd_per_hour,
        usd_per_mtoken=None
        if c.usd_per_hour is None
        else cost.usd_per_mtoken(c.usd_per_hour, tokens_per_s),
        batch_limit=batch_limit,
        bottleneck=_bottleneck(model_s, attention_s, wire_s, prefill_s * decode),
    )


def _choose_batch(
    shape: ModelShape, workload: Workload, c: _Candidate
) -> tuple[int, str]:
    """The batch, and what limits it."""
    capacity = cost.max_batch(shape, c.kv_budget, workload.context)
    limit, batch_limit = capacity, "memory"
    if workload.max_batch is not None and workload.max_batch < limit:
        limit, batch_limit = workload.max_batch, "max batch"
    if limit < c.num_batches:
        raise DoesNotFitError(
            f"{c.label} cannot run {c.num_batches} request(s) of "
            f"{workload.context:,.0f} tokens at once: "
            f"{max(c.kv_budget, 0) / 1e9:.1f} GB are left for KV, one request takes "
            f"{shape.kv_bytes(workload.context) / 1e9:.2f} GB, and the {batch_limit} "
            f"limit is {limit}. Use more memory, a shorter context, or --kv-dtype fp8."
        )
    slo_s = workload.slo_tbt_s
    if slo_s is None or c.tbt(limit) <= slo_s:
        return limit, batch_limit
    return _largest_within(c, limit, slo_s), "SLO"


def _largest_within(c: _Candidate, limit: int, slo_s: float) -> int:
    """Largest batch up to `limit` whose time between tokens is within the SLO."""
    low, high = c.num_batches - 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        if c.tbt(middle) <= slo_s:
            low = middle
        else:
            high = middle - 1
    if low < c.num_batches:
        raise DoesNotFitError(
            f"{c.label} takes {c.tbt(c.num_batches) * 1e3:.1f} ms per token with "
            f"{c.num_batches} request(s); the SLO is {slo_s * 1e3:.1f} ms. A smaller "
            "step needs faster or more devices, or a lower network latency. Relax "
            "--slo-tbt-ms or change the hardware."
        )
    return low


def _bottleneck(
    model_s: float, attention_s: float, wire_s: float, prefill_per_decode: float
) -> str:
    if prefill_per_decode > 1:
        return "prefill"
    parts = {"model": model_s, "attention": attention_s, "network": wire_s}
    return max(parts, key=lambda name: parts[name])
