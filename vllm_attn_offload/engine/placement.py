# SPDX-License-Identifier: Apache-2.0
"""Chooses the devices, CPUs and memory of local memory nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.args import data_parallel_size, run_dir
from vllm_attn_offload.engine.cpu_shares import check_cpus, local_cpus
from vllm_attn_offload.engine.node_launch import Launch
from vllm_attn_offload.engine.ray_placement import ray_nodes
from vllm_attn_offload.memory_node.launcher import (
    MemoryNodeProcess,
    available_host_bytes,
    local_name,
    unpromised_host_bytes,
)
from vllm_attn_offload.protocol.messages import GIB
from vllm_attn_offload.ray_nodes.cluster import check_installed

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Local nodes together hold what one node would: others need memory, too.
_LOCAL_SHARE = 0.5
#: A GPU is idle with up to this share of its memory in use.
_IDLE_SHARE = 0.05


def local_nodes(
    vllm_config: VllmConfig, config: AttentionOffloadConfig
) -> list[Launch]:
    """Decide the device, CPUs and memory of each memory node that an engine starts.

    Returns:
        One launcher per node; none if the options name running nodes.
    """
    check_cpus(config)
    if config.ray_pool is not None:
        return ray_nodes(vllm_config, config)
    if config.memory_nodes:
        return []
    engine = vllm_config.parallel_config.data_parallel_index
    num_engines = data_parallel_size(vllm_config)
    devices = local_devices(
        config.num_local_nodes,
        vllm_config.parallel_config.local_world_size,
        engine,
        num_engines,
    )
    budget_gib = config.kv_cache_gib
    if "cpu" in devices:
        budget_gib = local_kv_cache_gib(config, num_engines)
    cpus = local_cpus(config, vllm_config)
    return [
        functools.partial(
            _launch,
            directory=run_dir(engine, index),
            name=local_name(run_dir(engine, index)),
            device=device,
            cpus=cpus_of_node,
            budget_gib=budget_gib,
            startup_timeout_s=config.startup_timeout_s,
            auth_token_file=config.auth_token_file,
        )
        for index, (device, cpus_of_node) in enumerate(zip(devices, cpus, strict=True))
    ]


def _launch(
    kv_cache_gib: float | None,
    *,
    directory: Path,
    name: str,
    device: str,
    cpus: str,
    budget_gib: float | None,
    startup_timeout_s: float,
    auth_token_file: str,
) -> MemoryNodeProcess:
    return MemoryNodeProcess(
        directory,
        kv_cache_gib=kv_cache_gib or budget_gib,
        cpus=cpus,
        startup_timeout_s=startup_timeout_s,
        device=device,
        auth_token_file=auth_token_file,
        name=name,
    )


def check_local_memory(config: AttentionOffloadConfig, vllm_config: VllmConfig) -> None:
    """Refuse a KV cache that this host's memory, or its container's, does not hold.

    Raises:
        ValueError: The local nodes of all engines here would hold more than there is.
        ImportError: Ray is to place the nodes and is not installed.
    """
    if config.ray_pool is not None:
        check_installed()
    if config.kv_cache_gib is None or config.memory_nodes:
        return
    parallel = vllm_config.parallel_config
    num_engines = parallel.data_parallel_size_local
    devices = local_devices(
        config.num_local_nodes, parallel.local_world_size, 0, num_engines
    )
    num_nodes = devices.count("cpu") * num_engines
    wanted_gib = config.kv_cache_gib * num_nodes
    available_gib = available_host_bytes() / GIB
    if wanted_gib > available_gib:
        raise ValueError(
            f"kv_cache_gib={config.kv_cache_gib:g} was given for {num_nodes} local "
            f"memory node(s): {wanted_gib:g} GiB, and {available_gib:.2f} GiB of "
            f"memory are available here. Allowed: up to {available_gib / num_nodes:.2f}"
            ". Lower kv_cache_gib or num_local_nodes, stop other processes, or name "
            "nodes of other hosts in memory_nodes."
        )


def local_kv_cache_gib(
    config: AttentionOffloadConfig, num_engines: int
) -> float | None:
    """Choose the budget of each local memory node; None leaves the node's default.

    Args:
        config: The engine's options.
        num_engines: Engines of this deployment that start nodes on this host.
    """
    num_nodes = config.num_local_nodes * num_engines
    if config.kv_cache_gib is not None or num_nodes == 1:
        return config.kv_cache_gib
    return unpromised_host_bytes() * _LOCAL_SHARE / num_nodes / GIB


def local_devices(
    num_nodes: int, workers_per_engine: int, engine: int, num_engines: int
) -> list[str]:
    """Choose devices of an engine's local nodes: idle GPUs behind those that compute.

    Args:
        num_nodes: Local nodes of each engine.
        workers_per_engine: GPUs that each engine computes on.
        engine: Index of the engine among those that share this host.
        num_engines: Engines that share this host.

    Returns:
        ``cuda:N`` for each node if there are enough idle GPUs, else ``cpu``.
    """
    if not current_platform.is_cuda():
        return ["cpu"] * num_nodes
    spare = range(num_engines * workers_per_engine, current_platform.device_count())
    return choose_devices(num_nodes, engine, list(spare), is_idle)


def choose_devices(
    num_nodes: int, engine: int, spare: list[int], is_idle: Callable[[int], bool]
) -> list[str]:
    """Choose like ``local_devices`` from ``spare``, GPUs that no engine computes on."""
    mine = spare[engine * num_nodes : (engine + 1) * num_nodes]
    if len(mine) < num_nodes or not all(map(is_idle, mine)):
        return ["cpu"] * num_nodes
    return [f"cuda:{gpu}" for gpu in mine]


def is_idle(gpu: int) -> bool:
    """Tell whether a visible GPU's memory is unused, without making a context there."""
    nvml = import_pynvml()
    nvml.nvmlInit()
    try:
        physical = current_platform.visible_device_id_to_physical_device_id(gpu)
        memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(physical))
        return bool(memory.used <= _IDLE_SHARE * memory.total)
    finally:
        nvml.nvmlShutdown()
