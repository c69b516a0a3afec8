# SPDX-License-Identifier: Apache-2.0
"""Explore ratios of compute to memory devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vllm_attn_offload.planner.estimate.compare import compare
from vllm_attn_offload.planner.estimate.deployment import (
    DoesNotFitError,
    Estimate,
    Offload,
    Workload,
    evaluate_homogeneous,
)
from vllm_attn_offload.planner.hardware import (
    Device,
    DeviceGroup,
    common_price_list,
    groups_price,
)
from vllm_attn_offload.planner.model.shape import ModelShape

COMPUTE_COUNTS = (1, 2, 4, 8)
MEMORY_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)


def search_ratios(
    shape: ModelShape,
    offload: Offload,
    workload: Workload,
    max_micro_batches: int = 2,
    price_list: str | None = None,
) -> list[tuple[DeviceGroup, DeviceGroup | None, Estimate]]:
    """Every ratio that fits, and homogeneous groups (memory None), cheapest first."""
    compute, memory = offload.compute.device, offload.memory.device
    prices = price_list or common_price_list([compute, memory])
    if not (compute.price and memory.price):
        # One price without the other would rank dollars against devices.
        compute, memory = replace(compute, price={}), replace(memory, price={})
    found: list[tuple[DeviceGroup, DeviceGroup | None, Estimate]] = []
    for a in COMPUTE_COUNTS:
        for b in MEMORY_COUNTS:
            candidate = replace(
                offload,
                compute=DeviceGroup(compute, a),
                memory=DeviceGroup(memory, b),
                partition="auto",
            )
            result = compare(shape, candidate, workload, max_micro_batches, prices)
            best = result.best_offload
            if best is not None:
                found.append((candidate.compute, candidate.memory, best))
    both = {compute.name: compute, memory.name: memory}.values()
    kinds = [device for device in both if not device.attention_only]
    found += [(g, None, e) for g, e in _homogeneous(shape, kinds, workload, prices)]
    return sorted(found, key=lambda item: item[2].cost_per_token)


def _homogeneous(
    shape: ModelShape, kinds: Sequence[Device], workload: Workload, prices: str | None
) -> Iterator[tuple[DeviceGroup, Estimate]]:
    for device in kinds:
        for count in COMPUTE_COUNTS:
            group = DeviceGroup(device, count)
            usd = groups_price([group], prices)
            try:
                yield group, evaluate_homogeneous(shape, group, workload, usd)
            except DoesNotFitError:
                continue  # smaller groups that cannot hold the model are no candidates
