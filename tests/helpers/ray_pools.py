# SPDX-License-Identifier: Apache-2.0
"""Memory nodes in a Ray cluster of this machine, and who they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import psutil

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.protocol.messages import Stats
from vllm_attn_offload.ray_nodes.node_order import NodeOrder
from vllm_attn_offload.ray_nodes.owned_node import OwnedNode
from vllm_attn_offload.ray_nodes.owned_nodes import OwnedNodes
from vllm_attn_offload.ray_nodes.shared_node import SharedNode
from vllm_attn_offload.ray_nodes.shared_pool import SharedPool
from vllm_attn_offload.transport.trust import Credentials

KV_GIB = 0.05
TOKEN = b"a secret of these tests, 32+ characters"
#: Much less on a host where nothing else runs.
GONE_WITHIN_S = 10.0


def order(**changes: Any) -> NodeOrder:
    """A small node of one ``memory_node``."""
    wanted: dict[str, Any] = {
        "kv_cache_gib": KV_GIB,
        "device": "cpu",
        "resources": None,
        "auth_token": TOKEN,
        "startup_timeout_s": 60.0,
    }
    return NodeOrder(**wanted | changes)


@contextmanager
def owned(
    num_nodes: int, wanted: NodeOrder, group: Any = None, taken: Collection[int] = ()
) -> Iterator[list[Any]]:
    """Nodes that this process owns, placed at once as an engine does."""
    launches = OwnedNodes(num_nodes, wanted, group, taken, lambda nodes: None)
    with ExitStack() as stack, ThreadPoolExecutor(num_nodes) as threads:
        placed = [threads.submit(launch, None) for launch in launches.launches()]
        nodes: list[OwnedNode] = [each.result() for each in placed]
        for node in nodes:
            stack.callback(node.stop)
        yield nodes


def stats(node: OwnedNode | SharedNode) -> Stats:
    """What a node tells whoever knows its token."""
    with closing(
        ControlClient(node.address, 10, Credentials(token=node.auth_token))
    ) as client:
        return client.stats()


def process_of(node: OwnedNode | SharedNode) -> psutil.Process:
    """The node's process; all hosts are this one."""
    return psutil.Process(stats(node).node.pid)


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, whoever has to be told."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def shared(name: str) -> list[SharedNode]:
    """Nodes of a pool, found as an engine finds them."""
    launches = SharedPool(name).launches(60.0, lambda nodes: None)
    return [launch(None) for launch in launches]
