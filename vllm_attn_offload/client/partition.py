# SPDX-License-Identifier: Apache-2.0
"""Division of an engine's KV blocks between its memory nodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt

from vllm_attn_offload.protocol.geometry import SessionGeometry

PartitionKind = Literal["heads", "blocks"]
PARTITION_OPTIONS = ("heads", "blocks", "auto")


@dataclass(frozen=True)
class Partition:
    """Division of the blocks, or of the heads, between nodes.

    ``heads``: node *j* holds KV heads ``[j * H / N, (j + 1) * H / N)`` of every block.
    ``blocks``: every block lies on one node, by a fixed table in which nodes alternate
    in proportion to their capacity.

    Args:
        kind: What is divided.
        blocks_per_node: Blocks that each node holds.
    """

    kind: PartitionKind
    blocks_per_node: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        """Memory nodes of the engine."""
        return len(self.blocks_per_node)

    @property
    def num_blocks(self) -> int:
        """Blocks that the scheduler may hand out."""
        return pool_blocks(self.kind, self.blocks_per_node)

    @cached_property
    def node_of_block(self) -> npt.NDArray[np.int32]:
        """Node of every block id, ``[num_blocks]``; of ``blocks`` only."""
        # Block i of a node with capacity c is due at (i + 1/2) / c of the way: any run
        # of ids is then spread in proportion to the capacities.
        due = np.concatenate(
            [(np.arange(count) + 0.5) / count for count in self.blocks_per_node]
        )
        nodes = np.repeat(np.arange(self.num_nodes), self.blocks_per_node)
        return nodes[np.argsort(due, kind="stable")].astype(np.int32)

    @cached_property
    def local_block(self) -> npt.NDArray[np.int32]:
        """Index of every block id on its node, ``[num_blocks]``; of ``blocks`` only."""
        local = np.empty(self.num_blocks, np.int32)
        for node, count in enumerate(self.blocks_per_node):
            local[self.node_of_block == node] = np.arange(count)
        return local


def pool_blocks(kind: PartitionKind, blocks_per_node: tuple[int, ...]) -> int:
    """Size of the pool: heads need room for a block on every node, blocks on one."""
    return min(blocks_per_node) if kind == "heads" else sum(blocks_per_node)


def choose_partition(
    option: str, geometry: SessionGeometry, num_nodes: int
) -> tuple[PartitionKind, str]:
    """Decide what is divided between the nodes.

    Args:
        option: One of ``PARTITION_OPTIONS``.
        geometry: One worker's layers, undivided.
        num_nodes: Memory nodes of the engine.

    Returns:
        The kind, and why in a few words.

    Raises:
        ValueError: Heads were asked for and do not divide evenly.
    """
    uneven = sorted(
        {
            layer.num_kv_heads
            for layer in geometry.layers
            if layer.num_kv_heads % num_nodes
        }
    )
    if option == "heads" and uneven:
        raise ValueError(
            f"partition='heads' with {num_nodes} memory nodes and {uneven[0]} KV heads "
            "per worker was given. Allowed: a number of nodes that divides the KV "
            "heads. Use partition='blocks', or another number of nodes."
        )
    if option != "auto":
        return cast(PartitionKind, option), "it was asked for"
    if uneven:
        return "blocks", f"{uneven[0]} KV heads do not divide by {num_nodes} nodes"
    if num_nodes == 1:
        return "heads", "there is one node"
    return "heads", "KV heads divide evenly, so that nothing needs to be merged"


def shard_geometry(
    geometry: SessionGeometry, kind: PartitionKind, node: int, num_nodes: int
) -> SessionGeometry:
    """The layers as one node sees them.

    Raises:
        ValueError: Heads do not divide evenly.
    """
    if kind == "blocks" or num_nodes == 1:
        return geometry
    choose_partition(kind, geometry, num_nodes)
    return msgspec.structs.replace(
        geometry,
        layers=[
            msgspec.structs.replace(
                layer,
                num_query_heads=layer.num_query_heads // num_nodes,
                num_kv_heads=layer.num_kv_heads // num_nodes,
                alibi_slopes=_share(layer.alibi_slopes, node, num_nodes),
            )
            for layer in geometry.layers
        ],
    )


def _share(values: tuple[float, ...], index: int, num_shares: int) -> tuple[float, ...]:
    size = len(values) // num_shares
    return values[index * size : (index + 1) * size]


def divide_blocks(
    num_blocks: int, held: tuple[int, ...], partition: PartitionKind
) -> tuple[int, ...]:
    """Divide the blocks of a pool between nodes.

    Args:
        num_blocks: Blocks of the pool; no more than the nodes hold.
        held: Blocks that each node holds.
        partition: What is divided between the nodes.
    """
    if partition == "heads":
        return (num_blocks,) * len(held)
    total = sum(held)
    counts = [num_blocks * each // total for each in held]
    for index in range(num_blocks - sum(counts)):
        counts[index] += 1
    return tuple(counts)
