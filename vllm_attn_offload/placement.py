# SPDX-License-Identifier: Apache-2.0
"""Which CPUs of this host compute and which ones a local memory node gets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm import envs
from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_RESERVED_VARIABLE = "VLLM_CPU_NUM_OF_RESERVED_CPU"


def share_cpus(vllm_config: VllmConfig) -> str:
    """Split the host's CPUs between the workers and one local memory node.

    vLLM's automatic binding gives the workers all cores but one. Attention is the
    memory-bound half of a decode step, so half of the cores are reserved for the node,
    unless the user has bound threads or reserved CPUs already.

    Returns:
        CPUs of the node as ``--cpus`` takes them; empty where nothing is bound.
    """
    if not current_platform.is_cpu():
        return ""
    is_auto = envs.VLLM_CPU_OMP_THREADS_BIND == "auto"
    if is_auto and envs.VLLM_CPU_NUM_OF_RESERVED_CPU is None:
        # Read by vLLM when it binds the workers, after this.
        num_cores = len(os.sched_getaffinity(0))
        os.environ[_RESERVED_VARIABLE] = str(
            max(vllm_config.parallel_config.local_world_size, num_cores // 2)
        )
    manager = OMPProcessManager(vllm_config)
    if is_auto:
        cpus = set(manager.reserved_cpu_list)
    else:
        bound = {cpu for cpus in manager.cpu_lists for cpu in cpus}
        cpus = os.sched_getaffinity(0) - bound if bound else set()
    return ",".join(map(str, sorted(cpus)))
