# SPDX-License-Identifier: Apache-2.0
"""An engine's memory nodes that Ray places or finds."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.node_board import FoundNode, NodeBoard
from vllm_attn_offload.engine.node_launch import Launch, LaunchedNode
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.ray_nodes.cluster import connect
from vllm_attn_offload.ray_nodes.node_order import NodeOrder
from vllm_attn_offload.ray_nodes.owned_nodes import OwnedNodes
from vllm_attn_offload.ray_nodes.shared_pool import SharedPool

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup
    from vllm.config import VllmConfig

logger = get_logger(__name__)


def ray_nodes(vllm_config: VllmConfig, config: AttentionOffloadConfig) -> list[Launch]:
    """Join the Ray cluster and prepare the nodes of the options.

    Returns:
        A launcher per node.

    Raises:
        ImportError: Ray is not installed.
        ValueError: There is no cluster, or no such pool.
    """
    connect()
    # Workers that vLLM forks would have Ray's connection without its threads.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
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

    def group() -> PlacementGroup | None:
        from ray.util import get_current_placement_group

        workers = vllm_config.parallel_config.placement_group
        return workers or get_current_placement_group()

    return [*OwnedNodes(config.ray_nodes, order, group, show).launches()]


def new_token() -> bytes:
    """Make a token for a pool."""
    return secrets.token_hex(32).encode()
