# SPDX-License-Identifier: Apache-2.0
"""Which CPUs of this host compute and which ones local memory nodes get."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import psutil
from vllm import envs
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import parse_id_list
from vllm.utils.ompmultiprocessing import OMPProcessManager

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.protocol.messages import GIB

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: As of a node that is alone: the host's memory is needed by others, too.
_LOCAL_SHARE = 0.5
_RESERVED_VARIABLE = "VLLM_CPU_NUM_OF_RESERVED_CPU"


def share_cpus(vllm_config: VllmConfig) -> list[int]:
    """Split the host's CPUs between the workers and the local memory nodes.

    vLLM's automatic binding gives the workers all cores but one. Attention is the
    memory-bound half of a decode step, so half of the cores are reserved for the nodes,
    unless the user has bound threads or reserved CPUs already.

    Returns:
        CPUs of the nodes; none where nothing is bound.
    """
    if not current_platform.is_cpu():
        return []
    binding = envs.VLLM_CPU_OMP_THREADS_BIND
    if binding == "nobind":
        return []
    if binding != "auto":
        # Of all data-parallel ranks, while each knows its own workers only.
        bound = {cpu for part in binding.split("|") for cpu in parse_id_list(part)}
        return sorted(os.sched_getaffinity(0) - bound)
    if envs.VLLM_CPU_NUM_OF_RESERVED_CPU is None:
        # Read by vLLM when it binds the workers, after this.
        num_cores = len(os.sched_getaffinity(0))
        os.environ[_RESERVED_VARIABLE] = str(
            max(vllm_config.parallel_config.local_world_size, num_cores // 2)
        )
    return sorted(OMPProcessManager(vllm_config).reserved_cpu_list)


def local_cpus(config: AttentionOffloadConfig, vllm_config: VllmConfig) -> list[str]:
    """CPUs of each local memory node, as ``--cpus`` takes them.

    Nodes have CPUs of their own where there are enough, and share all of them
    otherwise. Empty: the node's default.
    """
    num_nodes = config.num_local_nodes
    if not config.local_node_cpus:
        cpus = share_cpus(vllm_config)
    elif num_nodes == 1:
        return [config.local_node_cpus]
    else:
        cpus = parse_id_list(config.local_node_cpus)
    if len(cpus) < num_nodes:
        return [",".join(map(str, cpus))] * num_nodes
    bounds = [len(cpus) * index // num_nodes for index in range(num_nodes + 1)]
    return [
        ",".join(map(str, cpus[begin:end])) for begin, end in itertools.pairwise(bounds)
    ]


def local_kv_cache_gib(
    config: AttentionOffloadConfig, num_engines: int
) -> float | None:
    """Budget of each local memory node; None leaves the node's own default.

    Args:
        config: The engine's options.
        num_engines: Engines of this deployment that start nodes on this host.
    """
    num_nodes = config.num_local_nodes * num_engines
    if config.kv_cache_gib is not None or num_nodes == 1:
        return config.kv_cache_gib
    return psutil.virtual_memory().available * _LOCAL_SHARE / num_nodes / GIB
