# SPDX-License-Identifier: Apache-2.0
"""Memory nodes of an engine join it, and it says which of them it waits for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from vllm_attn_offload.engine.node_handle import NodeHandle
from vllm_attn_offload.logger import get_logger

logger = get_logger(__name__)

_INTERVAL_S = 5.0


def join_all(nodes: Sequence[NodeHandle], timeout_s: float) -> None:
    """Start or connect to all nodes at once; those that are missing are logged.

    Args:
        nodes: The nodes of a pool.
        timeout_s: Deadline of each to start, or to answer.

    Raises:
        MemoryNodeError: One of them cannot be started or reached.
    """
    started = time.monotonic()
    logger.info(
        "Attention offload: %s, at most %g s each", _intention(nodes), timeout_s
    )
    with ThreadPoolExecutor(len(nodes)) as threads:
        joins = {threads.submit(node.join, timeout_s): node for node in nodes}
        missing = set(joins)
        while missing := wait(missing, _INTERVAL_S).not_done:
            logger.info(
                "Attention offload: after %.0f of at most %g s, %d of %d memory "
                "node(s) not there yet: %s",
                time.monotonic() - started,
                timeout_s,
                len(missing),
                len(nodes),
                ", ".join(joins[each].address for each in joins if each in missing),
            )
    for join in joins:
        join.result()


def _intention(nodes: Sequence[NodeHandle]) -> str:
    known = [node.address for node in nodes if isinstance(node.source, str)]
    parts = [f"connecting to memory node(s) {', '.join(known)}"] if known else []
    if num_started := len(nodes) - len(known):
        parts.append(f"starting {num_started} memory node(s)")
    return " and ".join(parts)
