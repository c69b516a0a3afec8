# SPDX-License-Identifier: Apache-2.0
"""Bundles of an engine's placement group that its memory nodes take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from vllm_attn_offload.ray_nodes.node_order import NodeOrder, written


def choose_bundles(
    bundles: Sequence[Mapping[str, float]],
    taken: Collection[int],
    num_nodes: int,
    order: NodeOrder,
) -> list[int]:
    """Choose a bundle for each node; one holds several where its resources do.

    Args:
        bundles: Resources of each bundle of the group.
        taken: Bundles of the engine's workers, which would wait for what a node has.
        num_nodes: Number of nodes.
        order: Each of them.

    Returns:
        An index for each node. Empty: no free bundle holds any, and the group is not
        for them.

    Raises:
        ValueError: The free bundles hold some of the nodes.
    """
    rooms = {
        index: order.num_in(bundle)
        for index, bundle in enumerate(bundles)
        if index not in taken
    }
    places = [
        index
        for held in range(min(num_nodes, max(rooms.values(), default=0)))
        for index, room in rooms.items()
        if room > held
    ]
    if 0 < len(places) < num_nodes:
        raise ValueError(
            f"ray_nodes {num_nodes} was given in a placement group with room for "
            f"{len(places)}: each needs {written(order.needed)} in a bundle that no "
            f"worker takes, which bundles {', '.join(map(str, sorted(set(places))))} "
            f"have. Allowed: up to {len(places)} nodes. Add "
            f"{num_nodes - len(places)} bundle(s) with that to the group, or set "
            f"ray_nodes: {len(places)}."
        )
    return places[:num_nodes]
