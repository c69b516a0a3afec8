# SPDX-License-Identifier: Apache-2.0
"""Evaluate one deployment: with memory nodes, or homogeneous devices of one kind."""

from __future__ import annotations

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.candidate import Candidate
from vllm_attn_offload.planner.estimate.engine_times import EngineTimes
from vllm_attn_offload.planner.estimate.estimate import DoesNotFitError, Estimate
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.model.shape import ModelShape


def evaluate_offload(
    shape: ModelShape,
    offload: Offload,
    workload: Workload,
    usd_per_hour: float | None,
    num_micro_batches: int = 1,
) -> Estimate:
    """Best split of the compute devices into engines that share the memory nodes.

    Raises:
        DoesNotFitError: Weights exceed every split, or no request fits.
        ValueError: Impossible partition.
    """
    whole = EngineTimes(
        shape, offload.compute, offload, num_micro_batches=num_micro_batches
    )
    return _best_split(whole, workload, usd_per_hour)


def evaluate_homogeneous(
    shape: ModelShape,
    devices: DeviceCount,
    workload: Workload,
    usd_per_hour: float | None,
) -> Estimate:
    """Best split of one kind of device into equal tensor-parallel replicas.

    Raises:
        DoesNotFitError: No split holds the weights and one request.
    """
    return _best_split(EngineTimes(shape, devices), workload, usd_per_hour)


def _best_split(
    whole: EngineTimes, workload: Workload, usd_per_hour: float | None
) -> Estimate:
    """The fastest of all splits of the devices into equal tensor-parallel engines.

    What does not fit the largest engine fits no smaller one, so its reason is given.
    """
    found: list[Estimate] = []
    reason = DoesNotFitError("")
    count = whole.compute.count
    for tp in (t for t in range(1, count + 1) if count % t == 0):
        try:
            engine = whole.split(count // tp)
            _check_engine(engine)
            found.append(Candidate(engine, workload, usd_per_hour).evaluate())
        except DoesNotFitError as error:
            reason = error
    if not found:
        raise reason
    return max(found, key=lambda estimate: estimate.tokens_per_s)


def _check_engine(engine: EngineTimes) -> None:
    """Devices and query heads must split evenly, and the weights must fit."""
    shape, n, tp = engine.shape, engine.num_micro_batches, engine.compute.count
    replicas = max(n - 1, 1)
    if tp % replicas:
        raise DoesNotFitError(
            f"{n} micro-batches rotate over {replicas} model replicas. {tp} compute "
            "devices do not split into these. Use fewer micro-batches."
        )
    devices = DeviceCount(engine.compute.device, tp // replicas)
    heads = [layer.num_heads for layer in shape.layers]
    if any(num_heads % devices.count for num_heads in heads):
        raise DoesNotFitError(
            f"{shape.name} cannot run tensor-parallel on {devices}: its {min(heads)} "
            f"query heads do not split evenly. The count must divide {min(heads)}. Use "
            "another number of devices."
        )
    usable = cost.memory_budget(devices.device, 1)
    if shape.weight_bytes >= usable * devices.count:
        raise DoesNotFitError(
            f"The {shape.weight_bytes / 1e9:.1f} GB of weights of {shape.name} do not "
            f"fit {devices} ({devices.count * usable / 1e9:.1f} GB usable). At least "
            f"{int(shape.weight_bytes // usable) + 1}x{devices.device.name} are "
            "needed. Use more or larger devices, or fewer bits per weight."
        )
