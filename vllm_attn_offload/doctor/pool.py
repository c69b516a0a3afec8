# SPDX-License-Identifier: Apache-2.0
"""What the nodes of an engine are together: one pool of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vllm_attn_offload.client.partition import pool_blocks
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.doctor.node_cpus import check_node_cpus
from vllm_attn_offload.doctor.node_examination import NodeExamination
from vllm_attn_offload.memory_node.memory_claim import unpromised_host_bytes
from vllm_attn_offload.planner.model.shape import ModelShape
from vllm_attn_offload.protocol.messages import GIB, Stats

_LOCAL_SHARE = 0.5


def check_pool(
    case: Case, nodes: Sequence[NodeExamination], max_model_len: Callable[[], int]
) -> Iterator[Finding]:
    """Compare the pool with the longest request, and the nodes with each other.

    Args:
        case: What the engine would be.
        nodes: Those in use, without standbys.
        max_model_len: Waits until it knows how long a request may be; 0: it does not.
    """
    answers = [stats for each in nodes if (stats := each.answer()) is not None]
    yield from check_node_cpus(case, answers)
    if case.config.memory_nodes and not case.config.addresses:
        yield Finding.ok("pool", "not checked: Ray places the nodes with the engine")
        return
    shape = case.model_shape()
    if shape is None or not shape.kv_bytes_per_token:
        return
    if len(answers) < len(nodes):
        return  # said already
    free = _free_bytes(case, answers)
    num_bytes = _pool_bytes(case, shape, free)
    num_tokens = int(num_bytes / shape.kv_bytes_per_token)
    found = f"{len(free)} memory node(s) together hold {num_tokens:,} tokens"
    longest = max_model_len()
    if not longest:
        yield Finding.ok("pool", found)
    elif shape.kv_bytes(longest) <= num_bytes:
        yield Finding.ok("pool", f"{found}; a request has {longest:,} at most")
    else:
        yield Finding.fail(
            "pool",
            f"{found}, and a request may have {longest:,}",
            "room for one request of the greatest length",
            f"Add memory nodes, or pass --max-model-len {num_tokens // 128 * 128}.",
        )


def _free_bytes(case: Case, answers: Sequence[Stats]) -> list[int]:
    """What the engine would get of each node."""
    most = int((case.config.kv_cache_gib or 0) * GIB)
    if case.starts_nodes:
        count = case.config.num_local_nodes
        share = int(unpromised_host_bytes() * _LOCAL_SHARE) // count
        return [most or share] * count
    free = [each.node.kv_bytes_free for each in answers]
    return [min(each, most or each) for each in free]


def _pool_bytes(case: Case, shape: ModelShape, free: list[int]) -> int:
    divides = all(layer.num_kv_heads % len(free) == 0 for layer in shape.layers)
    by_heads = case.config.partition == "heads" or (
        case.config.partition == "auto" and divides
    )
    if by_heads:
        return len(free) * pool_blocks("heads", tuple(free))
    return pool_blocks("blocks", tuple(free))
