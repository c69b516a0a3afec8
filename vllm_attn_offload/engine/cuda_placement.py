# SPDX-License-Identifier: Apache-2.0
"""Which devices of a host with GPUs local memory nodes get."""

from __future__ import annotations

from collections.abc import Callable

from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml

#: What a GPU that nobody uses may have in use all the same, of its memory.
_IDLE_SHARE = 0.05


def local_devices(
    num_nodes: int, workers_per_engine: int, engine: int, num_engines: int
) -> list[str]:
    """Devices of an engine's local memory nodes: idle GPUs behind those that compute.

    Args:
        num_nodes: Local nodes of each engine.
        workers_per_engine: GPUs that each engine computes on.
        engine: Index of the engine, of all that share this host.
        num_engines: How many these are.

    Returns:
        ``cuda:N`` for each node where there are enough idle GPUs, else ``cpu``.
    """
    if not current_platform.is_cuda():
        return ["cpu"] * num_nodes
    spare = range(num_engines * workers_per_engine, current_platform.device_count())
    return choose_devices(num_nodes, engine, list(spare), is_idle)


def choose_devices(
    num_nodes: int, engine: int, spare: list[int], is_idle: Callable[[int], bool]
) -> list[str]:
    """As `local_devices`, from GPUs that no engine computes on."""
    mine = spare[engine * num_nodes : (engine + 1) * num_nodes]
    if len(mine) < num_nodes or not all(map(is_idle, mine)):
        return ["cpu"] * num_nodes
    return [f"cuda:{gpu}" for gpu in mine]


def is_idle(gpu: int) -> bool:
    """Whether nobody has memory of a visible GPU in use; no context is made there."""
    nvml = import_pynvml()
    nvml.nvmlInit()
    try:
        physical = current_platform.visible_device_id_to_physical_device_id(gpu)
        memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(physical))
        return bool(memory.used <= _IDLE_SHARE * memory.total)
    finally:
        nvml.nvmlShutdown()
