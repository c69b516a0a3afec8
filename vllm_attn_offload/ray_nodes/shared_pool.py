# SPDX-License-Identifier: Apache-2.0
"""A named pool of memory nodes in Ray, which outlives the engines that share it."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.ray_nodes.actor_calls import (
    create_actor,
    end_actor,
    node_state,
    start_node,
    wait_until_placed,
)
from vllm_attn_offload.ray_nodes.cluster import NAMESPACE, connect
from vllm_attn_offload.ray_nodes.node_actor import NodeState
from vllm_attn_offload.ray_nodes.node_order import NodeOrder
from vllm_attn_offload.ray_nodes.shared_node import SharedNode

_NAME = re.compile(r"attn-offload/([^/]+)/\d+-of-(\d+)")
#: An actor that Ray is restarting answers later; engines ask again.
_FIND_AGAIN_TIMEOUT_S = 5.0


class SharedPool:
    """Detached actors ``attn-offload/NAME/INDEX-of-SIZE``; Ray restarts them.

    A restarted one may be on another host, and has another address, so nodes are found
    by name whenever they are connected to.

    Args:
        name: Of the pool.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._nodes: dict[int, SharedNode] = {}

    @staticmethod
    def sizes() -> dict[str, int]:
        """Return the number of nodes of every pool of the cluster, by name.

        Those that have ended for good count as well, so that nobody takes a pool that
        lost some for a smaller one.
        """
        found: dict[str, int] = {}
        for each in connect().util.list_named_actors(all_namespaces=True):
            match = _NAME.fullmatch(each["name"])
            if match and each["namespace"] == NAMESPACE:
                found[match[1]] = int(match[2])
        return found

    def size(self) -> int:
        """Return the number of nodes.

        Raises:
            ValueError: There is no such pool.
        """
        sizes = self.sizes()
        if self.name not in sizes:
            raise ValueError(
                f"Ray has no pool of memory nodes called {self.name}. Allowed: "
                f"{', '.join(sorted(sizes)) or 'none, there are no pools'}. Make it "
                f"with: vllm-attn-offload ray up {self.name} --num N --kv-cache-gib G"
            )
        return sizes[self.name]

    def up(self, num_nodes: int, order: NodeOrder) -> list[NodeState]:
        """Place all nodes and wait until they are ready.

        Raises:
            ValueError: There is such a pool.
            MemoryNodeError: A node has no place or does not start; none is left.
        """
        if self.name in self.sizes():
            raise ValueError(
                f"Ray has a pool of memory nodes called {self.name}. Allowed: another "
                f"name. Or end that one with: vllm-attn-offload ray down {self.name}"
            )
        actors: list[Any] = []
        try:
            for index in range(num_nodes):
                options = {
                    "name": self._actor_name(index, num_nodes),
                    "namespace": NAMESPACE,
                    "lifetime": "detached",
                    "max_restarts": -1,
                }
                actors.append(create_actor(order, "SPREAD", **options))
            return [
                self._wait_for(actor, self._actor_name(index, num_nodes), order)
                for index, actor in enumerate(actors)
            ]
        except BaseException:
            for actor in actors:
                end_actor(actor)
            raise

    def down(self) -> int:
        """End all nodes, whoever uses them; returns their number.

        Raises:
            ValueError: There is no such pool.
        """
        num_nodes = self.size()
        for index in range(num_nodes):
            try:
                end_actor(self._actor(self._actor_name(index, num_nodes)))
            except MemoryNodeError:
                continue  # It ended meanwhile.
        return num_nodes

    def states(self) -> list[NodeState]:
        """Ask every node how it is.

        Raises:
            ValueError: There is no such pool.
        """
        states, num_nodes = [], self.size()
        for index in range(num_nodes):
            name = self._actor_name(index, num_nodes)
            try:
                state = node_state(self._actor(name), name)
            except MemoryNodeError as error:
                state = NodeState("", "", problem=error.cause)
            states.append(state)
        return states

    def launches(
        self,
        startup_timeout_s: float,
        on_change: Callable[[Sequence[SharedNode]], None],
    ) -> list[Callable[[float | None], SharedNode]]:
        """Return a function for each node that finds it, anew whenever called.

        They raise MemoryNodeError where it is not there, or does not start.

        Args:
            startup_timeout_s: Deadline for the first time.
            on_change: Told the nodes whenever one was found.

        Raises:
            ValueError: There is no such pool.
        """
        size = self.size()
        find = functools.partial(self._find, startup_timeout_s, on_change, size)
        return [functools.partial(find, index) for index in range(size)]

    def _find(
        self,
        startup_timeout_s: float,
        on_change: Callable[[Sequence[SharedNode]], None],
        size: int,
        index: int,
        kv_cache_gib: float | None,
    ) -> SharedNode:
        is_lost = kv_cache_gib is not None
        timeout_s = _FIND_AGAIN_TIMEOUT_S if is_lost else startup_timeout_s
        name = self._actor_name(index, size)
        node = SharedNode(start_node(self._actor(name), name, timeout_s))
        with self._lock:
            self._nodes[index] = node
            on_change(list(self._nodes.values()))
        return node

    def _wait_for(self, actor: Any, name: str, order: NodeOrder) -> NodeState:
        wait_until_placed(actor, order, name, order.startup_timeout_s)
        return start_node(actor, name, order.startup_timeout_s)

    def _actor(self, name: str) -> Any:
        try:
            return connect().get_actor(name, namespace=NAMESPACE)
        except ValueError as error:
            raise MemoryNodeError(
                name,
                "Ray has no such actor. Somebody may have ended it, or the pool: see "
                "'vllm-attn-offload ray list'.",
            ) from error

    def _actor_name(self, index: int, size: int) -> str:
        return f"attn-offload/{self.name}/{index + 1}-of-{size}"
