# SPDX-License-Identifier: Apache-2.0
"""An engine's memory nodes that Ray places or finds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm import envs

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.args import START_METHOD_VARIABLE
from vllm_attn_offload.engine.node_board import FoundNode, NodeBoard
from vllm_attn_offload.engine.node_launch import Launch, LaunchedNode
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.ray_nodes.cluster import connect
from vllm_attn_offload.ray_nodes.node_order import NodeOrder, new_token
from vllm_attn_offload.ray_nodes.owned_nodes import OwnedNodes
from vllm_attn_offload.ray_nodes.shared_pool import SharedPool

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup
    from vllm.config import ParallelConfig, VllmConfig

logger = get_logger(__name__)


def ray_nodes(vllm_config: VllmConfig, config: AttentionOffloadConfig) -> list[Launch]:
    """Join the Ray cluster and prepare the nodes of the options.

    Returns:
        A launcher per node.

    Raises:
        ImportError: Ray is not installed.
        ValueError: There is no cluster or no such pool, or too few bundles for nodes.
    """
    connect()
    # Workers that vLLM forks would have Ray's connection without its threads.
    os.environ[START_METHOD_VARIABLE] = "spawn"
    board = NodeBoard.find()
    engine = vllm_config.parallel_config.data_parallel_index
    logged: set[str] = set()

    def show(nodes: Sequence[LaunchedNode]) -> None:
        for address in {node.address for node in nodes} - logged:
            logged.add(address)
            logger.info("Attention offload: memory node %s is Ray's", address)
        if board is not None:
            found = [FoundNode(node.address, node.auth_token) for node in nodes]
            board.write(engine, found)

    if config.ray_pool:
        return [*SharedPool(config.ray_pool).launches(config.startup_timeout_s, show)]
    assert config.kv_cache_gib is not None  # The options were checked.
    order = NodeOrder(
        kv_cache_gib=config.kv_cache_gib,
        device=config.ray_device,
        resources=config.ray_resources,
        auth_token=config.credentials.read_token() or new_token(),
        startup_timeout_s=config.startup_timeout_s,
    )

    group, taken = _bundles(vllm_config.parallel_config)
    return [*OwnedNodes(config.ray_nodes, order, group, taken, show).launches()]


def _bundles(config: ParallelConfig) -> tuple[PlacementGroup | None, set[int]]:
    """Return the engine's placement group, and the bundles that its workers take.

    Only workers that Ray places take any, and they have the group by now.
    """
    from ray.util import get_current_placement_group

    group = config.placement_group
    if group is None:
        return get_current_placement_group(), set()
    if envs.VLLM_RAY_BUNDLE_INDICES:
        return group, {int(each) for each in envs.VLLM_RAY_BUNDLE_INDICES.split(",")}
    from vllm.v1.executor.ray_utils import get_bundles_sorted_by_node

    bundles = get_bundles_sorted_by_node(group)[: config.world_size]
    return group, {index for index, _, _ in bundles}
