# SPDX-License-Identifier: Apache-2.0
"""Offloading against homogeneous devices of equal cost, and the verdict in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vllm_attn_offload.planner import cost_model as cost
from vllm_attn_offload.planner.deployment import (
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
    price_per_hour,
)
from vllm_attn_offload.planner.model_shape import ModelShape

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
        return min(self.offloaded, key=lambda e: e.usd_per_mtoken, default=None)

    @property
    def best_alternative(self) -> Estimate | None:
        """The homogeneous deployment with the cheapest token."""
        return min(self.alternatives, key=lambda e: e.usd_per_mtoken, default=None)


def compare(
    shape: ModelShape,
    offload: Offload,
    workload: Workload,
    max_micro_batches: int = 2,
    price_list: str | None = None,
) -> Comparison:
    """Evaluate `offload` with 1..max_micro_batches and both homogeneous alternatives.

    Raises:
        ValueError: a device without a price, or an impossible partition.
    """
    devices = [offload.compute.device, offload.memory.device]
    prices = price_list or common_price_list(devices)
    usd = offload.compute.count * price_per_hour(devices[0], prices)
    usd += offload.memory.count * price_per_hour(devices[1], prices)
    refused: dict[str, None] = {}
    offloaded: list[Estimate] = []
    for n in range(1, max_micro_batches + 1):
        attempt = partial(evaluate_offload, shape, offload, workload, usd, n)
        offloaded += _try(attempt, refused)
    alternatives: list[Estimate] = []
    for device in {d.name: d for d in devices}.values():
        attempt = partial(_equal_cost, shape, device, workload, usd, prices)
        alternatives += _try(attempt, refused)
    best = min(offloaded, key=lambda e: e.usd_per_mtoken, default=None)
    rival = min(alternatives, key=lambda e: e.usd_per_mtoken, default=None)
    return Comparison(
        shape=shape,
        workload=workload,
        offload=offload,
        offloaded=tuple(offloaded),
        alternatives=tuple(alternatives),
        refused=tuple(refused),
        min_network_gbps=_min_network(shape, offload, best),
        price_list=prices or "mixed",
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


def _equal_cost(
    shape: ModelShape,
    device: Device,
    workload: Workload,
    usd: float,
    prices: str | None,
) -> Estimate:
    """Homogeneous devices of about `usd` per hour; more if the model needs it."""
    price = price_per_hour(device, prices)
    count = max(round(usd / price), 1)
    reason = DoesNotFitError(f"{device.name}: more than {MAX_HOMOGENEOUS} are needed.")
    for n in range(count, max(count, MAX_HOMOGENEOUS) + 1):
        try:
            group = DeviceGroup(device, n)
            return evaluate_homogeneous(shape, group, workload, n * price)
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
    need = best.replicas * cost.min_bandwidth(
        shape, rows, best.model_s, best.attention_s, ALPHA
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
    gain = rival.usd_per_mtoken / best.usd_per_mtoken - 1
    batches = f"batch {best.batch:,} against {rival.batch:,}"
    if gain >= MARGIN:
        more = f"{gain:.0%} more tokens per dollar"
        return f"Offload: {more} than {rival.label} ({batches})."
    if gain > -MARGIN:
        return (
            f"No clear gain: {gain:+.0%} tokens per dollar against {rival.label} "
            f"({batches}), within the model's error. Prefer the simpler deployment."
        )
    reason = _reason(offload, best, rival)
    return (
        f"Do not offload, because {reason}: {-gain:.0%} fewer tokens per dollar than "
        f"{rival.label} ({batches})."
    )


def _reason(offload: Offload, best: Estimate, rival: Estimate) -> str:
    work = best.model_s + best.attention_s + best.wire_s
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
        f"the model itself takes {best.model_s / work:.0%} of a step, and the memory "
        "nodes' share of the budget would have bought compute devices"
    )


def _notes(offload: Offload, prices: str | None) -> tuple[str, ...]:
    notes = []
    devices = [offload.compute.device, offload.memory.device]
    if prices is None:
        sources = "; ".join(
            f"{d.name}: {next(iter(d.price.values())).source}" for d in devices
        )
        notes.append(
            f"Prices come from different lists, compare with care ({sources})."
        )
    for device in dict.fromkeys(d.name for d in devices):
        kind = next(d for d in devices if d.name == device)
        used = kind.price.get(prices or "") or next(iter(kind.price.values()))
        for what, source in (("figures", kind.source), ("price", used.source)):
            if "assumption" in source:
                notes.append(f"{kind.name} {what}: {source}.")
    return tuple(notes)
