# SPDX-License-Identifier: Apache-2.0
"""vLLM's Ray executor with its KV cache on memory nodes."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
from vllm.v1.executor.ray_utils import (
    get_bundles_sorted_by_node,
    initialize_ray_cluster,
)

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.executor import AttentionOffloadExecutorMixin
from vllm_attn_offload.engine.reachable_nodes import check_from_hosts
from vllm_attn_offload.ray_nodes.cluster import connect
from vllm_attn_offload.versions import vllm_version


class _RayWorkers(RayExecutorV2):
    """vLLM's executor, which fails to start with the error of its worker."""

    def _init_executor(self) -> None:
        try:
            super()._init_executor()
        except RayTaskError as error:
            # Ray's own text is the worker's traceback.
            raise error.cause from error
        except RayError as error:
            raise RuntimeError(
                f"Ray could not start the workers ({str(error).strip()}). They need "
                "vllm and vllm-attn-offload[ray] of the same versions on every host "
                "of the cluster. See worker-*.err in /tmp/ray/session_latest/logs of "
                "the host that is named."
            ) from error

    def shutdown(self) -> None:
        """Kill the workers, where they have not ended with the connection to Ray."""
        if not ray.is_initialized():
            # To kill them, Ray would start a cluster.
            self.ray_worker_handles = []
        super().shutdown()


class RayAttentionOffloadExecutor(AttentionOffloadExecutorMixin, _RayWorkers):
    """Ranks are Ray actors, on any hosts of the cluster."""

    _found_group: PlacementGroup | None = None

    def _init_executor(self) -> None:
        self._found_group = self.parallel_config.placement_group
        try:
            super()._init_executor()
        except BaseException:
            # They would keep their GPUs for as long as this process is there.
            _RayWorkers.shutdown(self)
            self._remove_group()
            raise

    def _prepare_cluster(self) -> None:
        """Join the cluster and take the workers' GPUs: memory nodes may want some.

        Raises:
            ValueError: There is no cluster, or workers cannot reach the memory nodes.
        """
        config = AttentionOffloadConfig.of_engine(self.vllm_config)
        if not config.memory_nodes:
            raise ValueError(
                "distributed_executor_backend=ray was given without memory_nodes. "
                "Allowed: nodes that Ray places (memory_nodes: ray), or HOST:PORT of "
                "running ones; only Ray knows which devices of this host are free for "
                "local nodes. Set memory_nodes, or drop the option."
            )
        # First, because vLLM starts a cluster of its own where there is none.
        connect(show_logs=True)
        self._found_group = self._found_group or ray.util.get_current_placement_group()
        # Later versions need no GPU on the engine's host.
        is_032 = vllm_version().startswith("0.32.")
        options: dict[str, Any] = {"require_gpu_on_driver": False} if is_032 else {}
        initialize_ray_cluster(self.parallel_config, **options)
        group = self.parallel_config.placement_group
        assert group is not None
        hosts = {address for _, _, address in get_bundles_sorted_by_node(group)}
        if hosts != {ray.util.get_node_ip_address()}:
            given = f"Ray with workers on {', '.join(sorted(hosts))}"
            check_from_hosts(given, config)

    def _remove_group(self) -> None:
        """Remove the workers' placement group, unless it was there before."""
        group = self.parallel_config.placement_group
        if group is None or group == self._found_group or not ray.is_initialized():
            return
        self.parallel_config.placement_group = None
        # Without the cluster there is no group, and why the start failed is raised.
        with contextlib.suppress(RayError):
            ray.util.remove_placement_group(group)
