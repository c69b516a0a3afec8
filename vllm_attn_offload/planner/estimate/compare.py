# SPDX-License-Identifier: Apache-2.0
"""Offloading against homogeneous devices of equal cost, and the verdict in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.deployment import (
    DoesNotFitError,
    Estimate,
    Offload,
    Workload,
    evaluate_homogeneous,
    evaluate_offload,
)
from vllm_attn_offload.planner.hardware import (
    Device,
    DeviceGroup,
    common_price_list,
    groups_price,
    price_per_hour,
)
from vllm_attn_offload.planner.model.shape import ModelShape

# Wire time that Lamina (arXiv 2405.01814 section 3.3) accepts, relative to the rest.
ALPHA = 0.2
# Differences below this are within the model's error.
MARGIN = 0.05
MAX_HOMOGENEOUS = 64


@dataclass(frozen=True, slots=True)
class Comparison:
    """All deployments of one question, and the answer."""

    shape: ModelShape
    workload: Workload
    offload: Offload
    offloaded: tuple[Estimate, ...]
    alternatives: tuple[Estimate, ...]
    refused: tuple[str, ...]
    min_network_gbps: float | None
    price_list: str
    verdict: str
    notes: tuple[str, ...]

    @property
    def best_offload(self) -> Estimate | None:
        """The offloaded deployment with the cheapest token."""
        return min(self.offloaded, key=lambda e: e.cost_per_token, default=None)

    @property
    def best_alternative(self) -> Estimate | None:
        """The homogeneous deployment with the cheapest token."""
        return min(self.alternatives, key=lambda e: e.cost_per_token, default=None)


def compare(
    shape: ModelShape,
    offload: Offload,
    workload: Workload,
    max_micro_batches: int = 2,
    price_list: str | None = None,
) -> Comparison:
    """Evaluate `offload` with 1..max_micro_batches and the homogeneous alternatives.

    Where a device has no price, every device counts the same.

    Raises:
        ValueError: an impossible partition, or a compute device that runs no model.
    """
    devices = [offload.compute.device, offload.memory.device]
    if devices[0].attention_only:
        raise ValueError(
            f"{devices[0].name} cannot be a compute device: it was measured as a "
            "memory node. Allowed as --compute: devices that run the model. Swap "
            "--compute and --memory."
        )
    prices = price_list or common_price_list(devices)
    usd = groups_price([offload.compute, offload.memory], prices)
    refused: dict[str, None] = {}
    offloaded: list[Estimate] = []
    for n in range(1, max_micro_batches + 1):
        attempt = partial(evaluate_offload, shape, offload, workload, usd, n)
        offloaded += _try(attempt, refused)
    alternatives: list[Estimate] = []
    for device in {d.name: d for d in devices if not d.attention_only}.values():
        count = _equal_count(offload, device, usd, prices)
        attempt = partial(_equal_cost, shape, device, count, workload, usd, prices)
        alternatives += _try(attempt, refused)
    best = min(offloaded, key=lambda e: e.cost_per_token, default=None)
    rival = min(alternatives, key=lambda e: e.cost_per_token, default=None)
    return Comparison(
        shape=shape,
        workload=workload,
        offload=offload,
        offloaded=tuple(offloaded),
        alternatives=tuple(alternatives),
        refused=tuple(refused),
        min_network_gbps=_min_network(shape, offload, best),
        price_list="none" if usd is None else prices or "mixed",
        verdict=_verdict(offload, best, rival, list(refused)),
        notes=_notes(offload, prices),
    )


def _try(attempt: Callable[[], Estimate], refused: dict[str, None]) -> list[Estimate]:
    """The estimate, or nothing and the reason in `refused` (in order, each once)."""
    try:
        return [attempt()]
    except DoesNotFitError as error:
        refused[str(error)] = None
        return []


def _equal_count(
    offload: Offload, device: Device, usd: float | None, prices: str | None
) -> int:
    """How many of `device` cost as much as `offload`; without a price as many."""
    if usd is None:
        return offload.compute.count + offload.memory.count
    return max(round(usd / price_per_hour(device, prices)), 1)


def _equal_cost(
    shape: ModelShape,
    device: Device,
    count: int,
    workload: Workload,
    usd: float | None,
    prices: str | None,
) -> Estimate:
    """At least `count` devices; more if the model needs it."""
    price = None if usd is None else price_per_hour(device, prices)
    reason = DoesNotFitError(f"{device.name}: more than {MAX_HOMOGENEOUS} are needed.")
    for n in range(count, max(count, MAX_HOMOGENEOUS) + 1):
        try:
            group = DeviceGroup(device, n)
            total = None if price is None else n * price
            return evaluate_homogeneous(shape, group, workload, total)
        except DoesNotFitError as error:
            reason = error
    raise reason


def _min_network(
    shape: ModelShape, offload: Offload, best: Estimate | None
) -> float | None:
    """Gbit/s per port that keep wire time within ALPHA, at the best batch."""
    if best is None:
        return None
    rows = best.batch / best.replicas / best.num_batches
    model_s = best.model_s + best.overhead_s / best.num_batches
    need = best.replicas * cost.min_bandwidth(
        shape, rows, model_s, best.attention_s, ALPHA
    )
    partition = offload.resolved_partition(shape)
    replication = shape.wire_bytes(offload.memory.count, partition) / shape.wire_bytes()
    ports = min(offload.compute.count, offload.memory.count)
    return need * replication / ports * 8 / 1e9


def _verdict(
    offload: Offload, best: Estimate | None, rival: Estimate | None, refused: list[str]
) -> str:
    if best is None:
        return f"Do not offload, because it does not fit. {refused[0]}"
    if rival is None:
        return f"Offload: no homogeneous alternative holds the model. {refused[-1]}"
    gain = rival.cost_per_token / best.cost_per_token - 1
    unit = "device" if best.usd_per_hour is None else "dollar"
    batches = f"batch {best.batch:,} against {rival.batch:,}"
    if gain >= MARGIN:
        more = f"{gain:.0%} more tokens per {unit}"
        return f"Offload: {more} than {rival.label} ({batches})."
    if gain > -MARGIN:
        return (
            f"No clear gain: {gain:+.0%} tokens per {unit} against {rival.label} "
            f"({batches}), within the model's error. Prefer the simpler deployment."
        )
    reason = _reason(offload, best, rival)
    return (
        f"Do not offload, because {reason}: {-gain:.0%} fewer tokens per {unit} than "
        f"{rival.label} ({batches})."
    )


def _reason(offload: Offload, best: Estimate, rival: Estimate) -> str:
    model_s = best.model_s + best.overhead_s
    work = model_s + best.attention_s + best.wire_s
    if rival.label.endswith(offload.memory.device.name):
        return (
            f"{offload.memory.device.name} alone is cheaper: the same devices can also "
            "run the rest of the model"
        )
    if best.bottleneck == "prefill":
        return (
            f"prefill takes {best.prefill_share:.0%} of the compute devices' time "
            f"(homogeneous: {rival.prefill_share:.0%}, on more of them)"
        )
    if best.wire_s > max(best.attention_s, 0.3 * work):
        return (
            f"the network takes {best.wire_s / work:.0%} of a step "
            f"({offload.network.gbps:g} Gbps, {offload.network.latency_us:g} us)"
        )
    if best.bottleneck == "attention":
        return f"{offload.memory} read the KV cache too slowly for their price"
    return (
        f"the model itself takes {model_s / work:.0%} of a step, and the memory "
        "nodes' share of the budget would have bought compute devices"
    )


def _notes(offload: Offload, prices: str | None) -> tuple[str, ...]:
    notes = []
    devices = [offload.compute.device, offload.memory.device]
    unpriced = list(dict.fromkeys(d.name for d in devices if not d.price))
    if unpriced:
        notes.append(
            f"No price for {', '.join(unpriced)}: every device counts the same. Pass "
            + " ".join(f"--price {name}=USD_PER_HOUR" for name in unpriced)
            + " to compare cost."
        )
    elif prices is None:
        sources = "; ".join(
            f"{d.name}: {next(iter(d.price.values())).source}" for d in devices
        )
        notes.append(
            f"Prices come from different lists, compare with care ({sources})."
        )
    for device in dict.fromkeys(d.name for d in devices):
        kind = next(d for d in devices if d.name == device)
        sources_of = [("figures", kind.source)]
        if kind.price:
            used = kind.price.get(prices or "") or next(iter(kind.price.values()))
            sources_of.append(("price", used.source))
        notes += [
            f"{kind.name} {what}: {source}."
            for what, source in sources_of
            if "assumption" in source
        ]
    return tuple(notes)
