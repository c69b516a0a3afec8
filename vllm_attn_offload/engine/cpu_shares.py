# SPDX-License-Identifier: Apache-2.0
"""Divides a host's CPUs between workers and local memory nodes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm import envs
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import LogicalCPUInfo, get_allowed_cpu_list
from vllm.utils.ompmultiprocessing import OMPProcessManager

from vllm_attn_offload.config import COMMON_CPUS_VARIABLE, AttentionOffloadConfig
from vllm_attn_offload.cpu_list import parse_cpu_list
from vllm_attn_offload.engine.args import (
    BINDING_VARIABLE,
    RESERVED_CPUS_VARIABLE,
    SPIN_VARIABLE,
    data_parallel_size,
)
from vllm_attn_offload.engine.cpu_quota import cpu_quota
from vllm_attn_offload.logger import get_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

#: libgomp's threads spin this often between parallel regions; its default lasts about a
#: millisecond, which a node on the same core waits for. This lasts about as long as the
#: gaps within a layer.
_SPIN_COUNT = "10000"
#: With more cores than this, vLLM's own reserve for the scheduler is kept.
_FEW_CORES = 4


def check_cpus(config: AttentionOffloadConfig) -> None:
    """Refuse CPUs that local nodes or workers cannot have, before any is started.

    Raises:
        ValueError: A CPU is not on this host, or not for this process; or vLLM's
            VLLM_CPU_OMP_THREADS_BIND is no list of CPUs.
    """
    if current_platform.is_cpu():
        _bound_cpus()
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


def local_cpus(
    config: AttentionOffloadConfig,
    vllm_config: VllmConfig,
    quota: float | None = None,
) -> list[str]:
    """Choose the CPUs of each local memory node, in the syntax of ``--cpus``.

    Nodes have CPUs of their own if there are enough and share all of them otherwise.
    Where whole steps run, the worker is one of those that share: while nodes attend it
    waits. A step that it cuts divides these CPUs as long as it runs
    (`attention/micro_batch/half_team.py`). An empty string leaves the node's default.

    Args:
        config: The engine's options.
        vllm_config: The engine's configuration.
        quota: CPUs that the container of this process may use; None: ask the kernel.
    """
    num_nodes = config.num_local_nodes
    budget = _budget(vllm_config, cpu_quota() if quota is None else quota)
    if config.local_node_cpus:
        cpus = parse_cpu_list(config.local_node_cpus)
        if budget and _workers_are_ours():
            _reserve_cpus(vllm_config, budget, len(cpus))
        if num_nodes == 1:
            return [config.local_node_cpus]
    elif _take_turns(config, vllm_config):
        cpus = _common_cpus(vllm_config, budget)
        logger.info(
            "The worker and its memory nodes take turns on CPUs %s%s.",
            os.environ[BINDING_VARIABLE],
            ": steps run whole"
            if config.num_microbatches == 1
            else "; a step in two micro-batches may divide them",
        )
    else:
        cpus = _divided_cpus(vllm_config, budget)
        if current_platform.is_cpu() and cpus:
            cpus = by_domain(cpus, get_allowed_cpu_list())
            logger.info(
                "Memory nodes have CPUs %s, workers others where there are enough: %s.",
                ",".join(map(str, cpus)),
                _why_divided(config, vllm_config),
            )
    return _parts(cpus, num_nodes)


def by_domain(cpus: Iterable[int], infos: Iterable[LogicalCPUInfo]) -> list[int]:
    """Sort CPUs by their NUMA domain, so that nodes which divide them span few.

    Args:
        cpus: Some of the host's.
        infos: All of the host's.
    """
    domains = {info.id: info.numa_node for info in infos}
    return sorted(cpus, key=lambda cpu: (domains.get(cpu, -1), cpu))


def _parts(cpus: list[int], num_nodes: int) -> list[str]:
    """Divide CPUs in their order, or give all to every node where there are fewer."""
    if len(cpus) < num_nodes:
        return [",".join(map(str, cpus))] * num_nodes
    bounds = [len(cpus) * index // num_nodes for index in range(num_nodes + 1)]
    return [
        ",".join(map(str, cpus[begin:end])) for begin, end in itertools.pairwise(bounds)
    ]


def _divided_cpus(vllm_config: VllmConfig, budget: int) -> list[int]:
    """Split the host's CPUs between the workers and the local memory nodes.

    vLLM's automatic binding gives the workers all cores but one. Attention is the
    memory-bound half of a decode step, so half of the cores are reserved for the nodes,
    unless the user has bound threads or reserved CPUs already.

    Args:
        vllm_config: The engine's configuration.
        budget: CPUs for both, fewer than there are; 0: all.

    Returns:
        CPUs of the nodes; none if neither they nor workers are bound.
    """
    usable = sorted(os.sched_getaffinity(0))
    binding = envs.VLLM_CPU_OMP_THREADS_BIND
    if not current_platform.is_cpu() or binding == "nobind":
        # Workers run anywhere: engines at least have their nodes on different CPUs.
        engine = vllm_config.parallel_config.data_parallel_index
        begin = engine * budget % len(usable)
        return usable[begin : begin + budget]
    if binding != "auto":
        # CPUs of all data-parallel ranks; each rank knows only its own workers.
        bound = _bound_cpus()
        rest = sorted(set(usable) - bound)
        left = budget * data_parallel_size(vllm_config) - len(bound)
        return rest[: max(1, left)] if budget else rest
    if _workers_are_ours():
        _reserve_cpus(vllm_config, budget)
    workers, reserved = _auto_binding(vllm_config)
    if not budget:
        return reserved
    # Where the budget is used up, nodes share the workers' CPUs: they take turns.
    return reserved[: max(0, budget - len(workers))] or workers[:budget]


def _take_turns(config: AttentionOffloadConfig, vllm_config: VllmConfig) -> bool:
    """Tell whether the worker and its nodes never work at the same time.

    Ranks do, and micro-batches, and threads of LLVM's or Intel's OpenMP, to which vLLM
    gives a spin of 5 ms.
    """
    parallel = vllm_config.parallel_config
    preloaded = os.environ.get("LD_PRELOAD", "")
    return (
        config.num_microbatches != 2
        and parallel.local_world_size == data_parallel_size(vllm_config) == 1
        and _workers_are_ours()
        and not any(name in preloaded for name in ("libiomp", "libomp"))
    )


def _why_divided(config: AttentionOffloadConfig, vllm_config: VllmConfig) -> str:
    """Why workers compute while they are attended, or could, in users' words."""
    if not _workers_are_ours():
        return f"{BINDING_VARIABLE} or {RESERVED_CPUS_VARIABLE} is set"
    if config.num_microbatches == 2:
        return "num_microbatches=2"
    if vllm_config.parallel_config.local_world_size > 1:
        return "there are several ranks"
    if data_parallel_size(vllm_config) > 1:
        return "there are several engines"
    return "the preloaded OpenMP runtime spins"


def _common_cpus(vllm_config: VllmConfig, budget: int) -> list[int]:
    """Bind the worker to all cores, and return them for the nodes.

    Args:
        vllm_config: The engine's configuration.
        budget: CPUs for both, fewer than there are; 0: all.
    """
    workers, reserved = _auto_binding(vllm_config)
    cpus = sorted(workers + reserved)[: budget or None]
    if len(cpus) <= _FEW_CORES:
        workers = cpus
    workers = [cpu for cpu in workers if cpu in cpus]
    os.environ[BINDING_VARIABLE] = ",".join(map(str, workers))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(SPIN_VARIABLE, _SPIN_COUNT)
    os.environ[COMMON_CPUS_VARIABLE] = str(len(cpus))
    return cpus


def _budget(vllm_config: VllmConfig, quota: float) -> int:
    """CPUs of each engine and its nodes under a quota; 0: all that there are."""
    if quota >= len(os.sched_getaffinity(0)):
        return 0
    return max(1, int(quota / data_parallel_size(vllm_config)))


def _workers_are_ours() -> bool:
    """Tell whether the user left it to us how many CPUs the workers get."""
    return (
        current_platform.is_cpu()
        and envs.VLLM_CPU_OMP_THREADS_BIND == "auto"
        and envs.VLLM_CPU_NUM_OF_RESERVED_CPU is None
    )


def _reserve_cpus(
    vllm_config: VllmConfig, budget: int, num_node_cpus: int | None = None
) -> None:
    """Keep CPUs from the workers, half of all for nodes that were given none.

    vLLM reads their number later, when it binds the workers.
    """
    num_workers = vllm_config.parallel_config.local_world_size
    num_cpus = sum(map(len, _auto_binding(vllm_config)))
    num_used = min(budget or num_cpus, num_cpus)
    if num_node_cpus is None:
        num_node_cpus = num_used // 2
    num_reserved = num_cpus - max(num_workers, num_used - num_node_cpus)
    os.environ[RESERVED_CPUS_VARIABLE] = str(max(num_workers, num_reserved))


def _auto_binding(vllm_config: VllmConfig) -> tuple[list[int], list[int]]:
    """CPUs that vLLM binds workers to, and those that it leaves out.

    Both have one CPU of each core only.
    """
    manager = OMPProcessManager(vllm_config)
    workers = itertools.chain.from_iterable(manager.cpu_lists)
    return sorted(workers), sorted(manager.reserved_cpu_list)


def _bound_cpus() -> set[int]:
    """CPUs that the user bound workers to.

    Raises:
        ValueError: The variable is no list of CPUs for each worker.
    """
    binding = envs.VLLM_CPU_OMP_THREADS_BIND
    if binding in ("auto", "nobind"):
        return set()
    try:
        # vLLM itself reads the longest of ranges into memory.
        parts = filter(None, binding.split("|"))
        return {cpu for part in parts for cpu in parse_cpu_list(part)}
    except ValueError:
        raise ValueError(
            f"VLLM_CPU_OMP_THREADS_BIND={binding!r} was given. Allowed: CPU numbers "
            "and ranges of them with | between workers, auto or nobind. Write for "
            "example 8-15 or 0,2."
        ) from None
