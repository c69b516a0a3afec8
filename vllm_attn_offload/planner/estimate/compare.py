# SPDX-License-Identifier: Apache-2.0
"""Offloading against homogeneous devices of equal cost, and over ratios of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.deployment import (
    DoesNotFitError,
    Estimate,
    evaluate_homogeneous,
    evaluate_offload,
)
from vllm_attn_offload.planner.estimate.question import Question
from vllm_attn_offload.planner.estimate.verdict import notes, verdict
from vllm_attn_offload.planner.hardware.device import Device
from vllm_attn_offload.planner.hardware.device_count import (
    DeviceCount,
    common_price_list,
    total_price,
)

# Wire time that Lamina (arXiv 2405.01814 section 3.3) accepts, relative to the rest.
ALPHA = 0.2
MAX_HOMOGENEOUS = 64
COMPUTE_COUNTS = (1, 2, 4, 8)
MEMORY_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)

# Compute devices, memory nodes (None: homogeneous), and how they do.
Ratio = tuple[DeviceCount, DeviceCount | None, Estimate]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All deployments of one question, and the answer.

    `offloaded` has one estimate per number of micro-batches, `refused` sentences on
    what does not fit, `min_network_gbps` the 1e9 bits/s per port that keep wire time
    within ALPHA. `price_list` is "mixed" without a common list, "none" without prices.
    """

    question: Question
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
        return _cheapest(self.offloaded)


def compare(question: Question) -> Comparison:
    """Evaluate offloading with 1..n micro-batches, and the homogeneous alternatives.

    Where a device has no price, every device counts the same. Models with recurrent
    states run in 1 micro-batch.

    Raises:
        ValueError: An impossible partition, or a compute device that runs no model.
    """
    offload = question.offload
    _check_runs_models(offload.compute.device)
    prices = question.price_list or common_price_list(_devices(question))
    usd = total_price([offload.compute, offload.memory], prices)
    refused: dict[str, None] = {}
    offloaded = _offloaded(question, usd, refused)
    alternatives = _alternatives(question, usd, prices, refused)
    best = _cheapest(offloaded)
    return Comparison(
        question=question,
        offloaded=tuple(offloaded),
        alternatives=tuple(alternatives),
        refused=tuple(refused),
        min_network_gbps=None if best is None else _min_network(question, best),
        price_list="none" if usd is None else prices or "mixed",
        verdict=verdict(offload, best, _cheapest(alternatives), list(refused)),
        notes=notes(question, prices),
    )


def search_ratios(question: Question) -> list[Ratio]:
    """Every ratio that fits, and homogeneous devices, cheapest token first.

    Raises:
        ValueError: A compute device that runs no model.
    """
    compute, memory = _devices(question)
    prices = question.price_list or common_price_list([compute, memory])
    if not (compute.price and memory.price):
        # One price without the other would rank dollars against devices.
        compute, memory = replace(compute, price={}), replace(memory, price={})
    found: list[Ratio] = []
    for a in (DeviceCount(compute, count) for count in COMPUTE_COUNTS):
        for b in (DeviceCount(memory, count) for count in MEMORY_COUNTS):
            offload = replace(question.offload, compute=a, memory=b, partition="auto")
            asked = replace(question, offload=offload, price_list=prices)
            best = compare(asked).best_offload
            if best is not None:
                found.append((a, b, best))
    for device in _alone([compute, memory]):
        found += _homogeneous(question, device, prices)
    return sorted(found, key=lambda ratio: ratio[2].cost_per_token)


def _devices(question: Question) -> list[Device]:
    return [question.offload.compute.device, question.offload.memory.device]


def _alone(devices: list[Device]) -> list[Device]:
    """Those that can run the whole model, each once."""
    kinds = {device.name: device for device in devices}
    return [device for device in kinds.values() if not device.attention_only]


def _cheapest(estimates: list[Estimate] | tuple[Estimate, ...]) -> Estimate | None:
    return min(estimates, key=lambda e: e.cost_per_token, default=None)


def _check_runs_models(device: Device) -> None:
    if device.attention_only:
        raise ValueError(
            f"{device.name} cannot be a compute device: it was measured as a "
            "memory node. Allowed as --compute: devices that run the model. Swap "
            "--compute and --memory."
        )


def _offloaded(
    q: Question, usd: float | None, refused: dict[str, None]
) -> list[Estimate]:
    found: list[Estimate] = []
    most = 1 if q.shape.states else q.num_micro_batches
    for n in range(1, most + 1):
        attempt = partial(evaluate_offload, q.shape, q.offload, q.workload, usd, n)
        found += _try(attempt, refused)
    return found


def _alternatives(
    q: Question, usd: float | None, prices: str | None, refused: dict[str, None]
) -> list[Estimate]:
    """Homogeneous devices for as much money; without a price, as many devices."""
    found: list[Estimate] = []
    for device in _alone(_devices(q)):
        price = None if usd is None else device.usd_per_hour(prices)
        count = q.offload.compute.count + q.offload.memory.count
        if usd is not None and price is not None:
            count = max(round(usd / price), 1)
        found += _try(partial(_at_least, q, device, count, price), refused)
    return found


def _at_least(q: Question, device: Device, count: int, price: float | None) -> Estimate:
    """At least `count` devices; more if the model needs it."""
    reason = DoesNotFitError(f"{device.name}: more than {MAX_HOMOGENEOUS} are needed.")
    for n in range(count, max(count, MAX_HOMOGENEOUS) + 1):
        total = None if price is None else n * price
        try:
            devices = DeviceCount(device, n)
            return evaluate_homogeneous(q.shape, devices, q.workload, total)
        except DoesNotFitError as error:
            reason = error
    raise reason


def _try(attempt: Callable[[], Estimate], refused: dict[str, None]) -> list[Estimate]:
    """The estimate, or nothing and the reason in `refused` (in order, each once)."""
    try:
        return [attempt()]
    except DoesNotFitError as error:
        refused[str(error)] = None
        return []


def _homogeneous(q: Question, device: Device, prices: str | None) -> Iterator[Ratio]:
    for devices in (DeviceCount(device, count) for count in COMPUTE_COUNTS):
        usd = total_price([devices], prices)
        try:
            found = evaluate_homogeneous(q.shape, devices, q.workload, usd)
        except DoesNotFitError:
            continue  # fewer devices that cannot hold the model are no candidates
        yield devices, None, found


def _min_network(question: Question, best: Estimate) -> float:
    """Gbit/s per port that keep wire time within ALPHA, at the best batch."""
    shape, offload, n = question.shape, question.offload, best.num_micro_batches
    rows = best.batch / best.replicas / n
    model_s = best.model_s + best.overhead_s / n
    need = best.replicas * cost.min_bandwidth(
        shape, rows, model_s, best.attention_s, ALPHA
    )
    partition = offload.resolved_partition(shape)
    replication = shape.wire_bytes(offload.memory.count, partition) / shape.wire_bytes()
    ports = min(offload.compute.count, offload.memory.count)
    return need * replication / ports * 8 / 1e9
