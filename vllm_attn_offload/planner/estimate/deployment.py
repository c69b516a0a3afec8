# SPDX-License-Identifier: Apache-2.0
"""Evaluate one deployment: with memory nodes, or homogeneous devices of one kind."""

from __future__ import annotations

from collections.abc import Callable

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
    device, memory, network = offload.compute.device, offload.memory, offload.network

    def attempt(tp: int, replicas: int) -> Estimate:
        size = _check_rotation(tp, num_micro_batches)
        _check_engine(shape, DeviceCount(device, size))
        times = EngineTimes(
            shape, DeviceCount(device, tp), offload, replicas, num_micro_batches
        )
        share = memory.count / replicas
        bytes_per_s = network.bytes_per_s * min(tp, share)
        candidate = Candidate(
            label=f"{offload.compute} + {memory}",
            num_devices=offload.compute.count + memory.count,
            times=times,
            workload=workload,
            kv_budget=cost.memory_budget(memory.device, share),
            prefill_s=max(
                times.prefill(workload.prompt),
                shape.kv_bytes(workload.prompt) / bytes_per_s,
            ),
            usd_per_hour=usd_per_hour,
            replicas=replicas,
        )
        return candidate.evaluate()

    return _best_split(attempt, offload.compute.count)


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

    def attempt(tp: int, replicas: int) -> Estimate:
        engine = DeviceCount(devices.device, tp)
        _check_engine(shape, engine)
        times = EngineTimes(shape, engine)
        candidate = Candidate(
            label=str(devices),
            num_devices=devices.count,
            times=times,
            workload=workload,
            kv_budget=cost.memory_budget(devices.device, tp) - shape.weight_bytes,
            prefill_s=times.prefill(workload.prompt),
            usd_per_hour=usd_per_hour,
            replicas=replicas,
        )
        return candidate.evaluate()

    return _best_split(attempt, devices.count)


def _best_split(attempt: Callable[[int, int], Estimate], count: int) -> Estimate:
    """The fastest of all splits of `count` devices into equal tensor-parallel engines.

    What does not fit the largest engine fits no smaller one, so its reason is given.
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


def _check_rotation(tp: int, num_micro_batches: int) -> int:
    """Devices of each of the n - 1 model replicas that n micro-batches rotate over."""
    replicas = max(num_micro_batches - 1, 1)
    if tp % replicas:
        raise DoesNotFitError(
            f"{num_micro_batches} micro-batches rotate over {replicas} model replicas. "
            f"{tp} compute devices do not split into these. Use fewer micro-batches."
        )
    return tp // replicas


def _check_engine(shape: ModelShape, devices: DeviceCount) -> None:
    """Query heads must split evenly, and the weights must fit."""
    heads = [layer.num_heads for layer in shape.layers]
    if any(n % devices.count for n in heads):
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
