# SPDX-License-Identifier: Apache-2.0
"""The Ray actor beside a memory node: starts its process, and takes it along."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess
from vllm_attn_offload.ray_nodes.node_order import NodeOrder
from vllm_attn_offload.transport.address import Address

_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class NodeState:
    """What an actor tells of its node; ``problem`` is empty where it runs."""

    address: str
    host_id: str
    pid: int = 0
    auth_token: bytes = field(default=b"", repr=False)
    problem: str = ""


class NodeActor:
    """Starts ``vllm-memory-node`` on the host where Ray placed this actor.

    The node's process ends with the actor's, however that ends. A node that ended is
    started again when somebody asks for it.

    Args:
        order: The node.
    """

    def __init__(self, order: NodeOrder) -> None:
        self._order = order
        self._process: MemoryNodeProcess | None = None
        # Ray's, for an actor of few CPUs; the node has threads of its own.
        os.environ.pop("OMP_NUM_THREADS", None)
        threading.Thread(
            target=_end_with_parent, args=(os.getppid(),), name="raylet", daemon=True
        ).start()

    def host_id(self) -> str:
        """Return Ray's id of the host."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def start(self) -> NodeState:
        """Start the node unless it runs, and wait until it is ready."""
        import ray

        host = str(ray.util.get_node_ip_address())
        if self._process is None or not self._process.is_running:
            if self._process is not None:
                self._process.stop()  # It has a pipe of this process.
            device = "cuda:0" if self._order.device == "cuda" else self._order.device
            try:
                self._process = MemoryNodeProcess(
                    None,
                    kv_cache_gib=self._order.kv_cache_gib,
                    cpus="",
                    startup_timeout_s=self._order.startup_timeout_s,
                    device=device,
                    listen=str(Address(host=host)),
                    auth_token=self._order.auth_token,
                )
            except MemoryNodeError as error:
                return NodeState(host, self.host_id(), problem=error.cause)
        return self.state()

    def state(self) -> NodeState:
        """Tell of the node without starting it."""
        if self._process is None or not self._process.is_running:
            problem = "it has ended, and starts when an engine asks for it."
            return NodeState("", self.host_id(), problem=problem)
        return NodeState(
            self._process.address,
            self.host_id(),
            self._process.pid,
            self._order.auth_token,
        )


def _end_with_parent(raylet: int) -> None:
    """End with the raylet, without which nobody can end this actor.

    Ray looks as well, but takes a dead raylet that nobody has waited for as alive.
    """
    while os.getppid() == raylet:
        time.sleep(_LOOK_S)
    os._exit(1)
