# SPDX-License-Identifier: Apache-2.0
"""Places an engine's own memory nodes, and places lost ones elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from vllm_attn_offload.ray_nodes.actor_calls import (
    create_actor,
    end_actor,
    start_node,
    wait_until_placed,
)
from vllm_attn_offload.ray_nodes.bundles import choose_bundles
from vllm_attn_offload.ray_nodes.cluster import free_by_host
from vllm_attn_offload.ray_nodes.node_order import NodeOrder, written
from vllm_attn_offload.ray_nodes.owned_node import OwnedNode

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

#: A lost node that is placed nowhere by then may be replaced by a standby.
_REPLACE_TIMEOUT_S = 15.0


class OwnedNodes:
    """Memory nodes that Ray places for one engine, and that end with it.

    Ray restarts none of them: the engine knows what a lost node held, and places
    another one.

    Args:
        num_nodes: Number of nodes.
        order: Each of them.
        placement_group: The engine's, if it has one.
        taken: Bundles of it that workers take.
        on_change: Told the nodes whenever one was placed.

    Raises:
        ValueError: The group holds some of the nodes.
    """

    def __init__(
        self,
        num_nodes: int,
        order: NodeOrder,
        placement_group: PlacementGroup | None,
        taken: Collection[int],
        on_change: Callable[[Sequence[OwnedNode]], None],
    ) -> None:
        self._num_nodes = num_nodes
        self._order = order
        self._group = placement_group
        self._bundles: list[int] = []
        if placement_group is not None:
            specs = placement_group.bundle_specs
            self._bundles = choose_bundles(specs, taken, num_nodes, order)
        self._on_change = on_change
        # Lost nodes are placed by a thread each.
        self._lock = threading.Lock()
        self._nodes: dict[int, OwnedNode] = {}
        self._hosts: dict[int, str] = {}

    def launches(self) -> list[Callable[[float | None], OwnedNode]]:
        """Return a function for each node that places it, anew whenever called.

        They raise MemoryNodeError where Ray has no place, or the node does not start.
        """
        return [
            functools.partial(self._place, index) for index in range(self._num_nodes)
        ]

    def _place(self, index: int, kv_cache_gib: float | None) -> OwnedNode:
        order, timeout_s = self._order, self._order.startup_timeout_s
        if kv_cache_gib is not None:  # It was lost.
            order = dataclasses.replace(order, kv_cache_gib=kv_cache_gib)
            timeout_s = min(timeout_s, _REPLACE_TIMEOUT_S)
        name = f"{index + 1} of {self._num_nodes} (Ray)"
        actor = create_actor(order, self._strategy(index), max_restarts=0)
        try:
            bundle = self._bundle(index)
            host_id = wait_until_placed(actor, order, name, timeout_s, bundle)
            node = OwnedNode(actor, start_node(actor, name, order.startup_timeout_s))
        except BaseException:
            end_actor(actor)
            raise
        with self._lock:
            self._hosts[index], self._nodes[index] = host_id, node
            self._on_change(list(self._nodes.values()))
        return node

    def _strategy(self, index: int) -> Any:
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        if self._group is not None and self._bundles:
            return PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._bundles[index]
            )
        host_id = self._other_host(index)
        if host_id is None:
            return "SPREAD"
        return NodeAffinitySchedulingStrategy(host_id, soft=False)

    def _bundle(self, index: int) -> str:
        """Write which bundle a node goes to; empty: to none."""
        if self._group is None or not self._bundles:
            return ""
        bundle = self._bundles[index]
        holds = written(self._group.bundle_specs[bundle])
        return f"bundle {bundle} of the engine's placement group ({holds})"

    def _other_host(self, index: int) -> str | None:
        """Choose a host for a node that was lost, before Ray knows that its host was.

        Returns:
            None where the node is new, or no other host has room.
        """
        with self._lock:
            lost = self._hosts.get(index)
            if lost is None:
                return None
            fitting = [
                host_id
                for host_id, free in free_by_host().items()
                if host_id != lost and self._order.fits(free)
            ]
            taken = set(self._hosts.values())
            fitting.sort(key=taken.__contains__)
            if not fitting:
                return None
            self._hosts[index] = fitting[0]
            return fitting[0]
