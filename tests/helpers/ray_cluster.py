# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of raylets on this machine, which stand for hosts."""

from __future__ import annotations

import os
import signal
from types import TracebackType
from typing import Any

import psutil
import pytest

#: The smallest that Ray takes.
_OBJECT_STORE_BYTES = 80 << 20
_HOST = {"num_cpus": 1, "object_store_memory": _OBJECT_STORE_BYTES}


class RayCluster:
    """A head, and hosts with one ``memory_node`` each; RAY_ADDRESS names it meanwhile.

    Drivers join by the head's raylet, which therefore has no memory node to lose.

    Args:
        num_hosts: Hosts besides the head.
    """

    def __init__(self, num_hosts: int = 2) -> None:
        from ray.cluster_utils import Cluster

        self._environment = pytest.MonkeyPatch()
        # Raylets inherit it, and so do nodes: unwritten blocks hold NaN.
        self._environment.setenv("ATTN_OFFLOAD_POISON_KV", "1")
        self._cluster: Any = Cluster(
            initialize_head=True, head_node_args=_HOST | {"include_dashboard": False}
        )
        self.address: str = self._cluster.address
        self._environment.setenv("RAY_ADDRESS", self.address)
        for _ in range(num_hosts):
            self._add_host()

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()
        self._environment.undo()

    def kill_raylet(self, host_id: str) -> None:
        """Kill a host's raylet alone; nobody waits for it, and Ray is not told."""
        os.kill(self._raylet(host_id), signal.SIGKILL)

    def kill_host(self, host_id: str) -> None:
        """Kill all processes of a host at once; Ray is not told."""
        raylet = psutil.Process(self._raylet(host_id))
        for process in (raylet, *raylet.children(recursive=True)):
            process.kill()

    def replace_host(self, host_id: str) -> None:
        """Remove what is left of a killed host, and add a new one."""
        self._cluster.remove_node(self._host(host_id), allow_graceful=False)
        self._add_host()

    def _raylet(self, host_id: str) -> int:
        (raylet,) = self._host(host_id).all_processes["raylet"]
        pid: int = raylet.process.pid
        return pid

    def _host(self, host_id: str) -> Any:
        hosts = self._cluster.worker_nodes
        (found,) = (host for host in hosts if host.node_id == host_id)
        return found

    def _add_host(self) -> None:
        self._cluster.add_node(**_HOST, resources={"memory_node": 1})
