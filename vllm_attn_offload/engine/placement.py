# SPDX-License-Identifier: Apache-2.0
"""Divides a host's devices, CPUs and memory between workers and memory nodes."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm import envs
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import parse_id_list
from vllm.utils.import_utils import import_pynvml
from vllm.utils.ompmultiprocessing import OMPProcessManager

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.cpu_list import parse_cpu_list
from vllm_attn_offload.engine.args import (
    RESERVED_CPUS_VARIABLE,
    data_parallel_size,
    run_dir,
)
from vllm_attn_offload.engine.node_handle import Launch
from vllm_attn_offload.memory_node.launcher import (
    MemoryNodeProcess,
    unpromised_host_bytes,
)
from vllm_attn_offload.protocol.messages import GIB

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Local nodes together hold what one node would: others need memory, too.
_LOCAL_SHARE = 0.5
#: A GPU is idle with up to this share of its memory in use.
_IDLE_SHARE = 0.05


def local_nodes(
    vllm_config: VllmConfig, config: AttentionOffloadConfig
) -> list[Launch]:
    """Decide the device, CPUs and memory of each local memory node of an engine.

    Returns:
        One launcher per node; none if the options name running nodes.
    """
    check_local_cpus(config)
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
    )


def check_local_cpus(config: AttentionOffloadConfig) -> None:
    """Refuse CPUs that local nodes cannot have, before any of them is started.

    Raises:
        ValueError: A CPU is not on this host, or not for this process.
    """
    if not config.local_node_cpus or config.memory_nodes:
        return
    usable = os.sched_getaffinity(0)
    if absent := set(parse_cpu_list(config.local_node_cpus)) - usable:
        raise ValueError(
            f"local_node_cpus={config.local_node_cpus!r} was given, and CPU "
            f"{min(absent)} is not usable here. Allowed: "
            f"{','.join(map(str, sorted(usable)))}. Choose from these, or leave "
            "local_node_cpus out."
        )


def share_cpus(vllm_config: VllmConfig) -> list[int]:
    """Split the host's CPUs between the workers and the local memory nodes.

    vLLM's automatic binding gives the workers all cores but one. Attention is the
    memory-bound half of a decode step, so half of the cores are reserved for the nodes,
    unless the user has bound threads or reserved CPUs already.

    Returns:
        CPUs of the nodes; none if workers are not bound.
    """
    if not current_platform.is_cpu():
        return []
    binding = envs.VLLM_CPU_OMP_THREADS_BIND
    if binding == "nobind":
        return []
    if binding != "auto":
        # CPUs of all data-parallel ranks; each rank knows only its own workers.
        bound = {cpu for part in binding.split("|") for cpu in _bound_cpus(part)}
        return sorted(os.sched_getaffinity(0) - bound)
    if envs.VLLM_CPU_NUM_OF_RESERVED_CPU is None:
        # vLLM reads it later, when it binds the workers.
        num_cores = len(os.sched_getaffinity(0))
        os.environ[RESERVED_CPUS_VARIABLE] = str(
            max(vllm_config.parallel_config.local_world_size, num_cores // 2)
        )
    return sorted(OMPProcessManager(vllm_config).reserved_cpu_list)


def local_cpus(config: AttentionOffloadConfig, vllm_config: VllmConfig) -> list[str]:
    """Choose the CPUs of each local memory node, in the syntax of ``--cpus``.

    Nodes have CPUs of their own if there are enough and share all of them otherwise.
    An empty string leaves the node's default.
    """
    num_nodes = config.num_local_nodes
    if not config.local_node_cpus:
        cpus = share_cpus(vllm_config)
    elif num_nodes == 1:
        return [config.local_node_cpus]
    else:
        cpus = parse_cpu_list(config.local_node_cpus)
    if len(cpus) < num_nodes:
        return [",".join(map(str, cpus))] * num_nodes
    bounds = [len(cpus) * index // num_nodes for index in range(num_nodes + 1)]
    return [
        ",".join(map(str, cpus[begin:end])) for begin, end in itertools.pairwise(bounds)
    ]


def _bound_cpus(text: str) -> list[int]:
    try:
        return parse_id_list(text)  # as vLLM reads it
    except ValueError as error:
        raise ValueError(
            f"VLLM_CPU_OMP_THREADS_BIND={text!r} was given. Allowed: CPU numbers and "
            "ranges of them. Write for example 8-15 or 0,2."
        ) from error


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
