# SPDX-License-Identifier: Apache-2.0
"""Refuses a pool that holds no request of the longest context, before vLLM does.

vLLM's own sentence names its limits on the compute host, which do not apply.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from vllm_attn_offload.client.partition import PartitionKind, divide_blocks
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.protocol.messages import GIB

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec


class HoldsBlocks(Protocol):
    """A memory node with the blocks of each rank and the bytes of all ranks."""

    address: str

    @property
    def num_blocks(self) -> Sequence[int]: ...

    @property
    def kv_bytes(self) -> int: ...


def check_pool_size(
    vllm_config: VllmConfig,
    groups: Sequence[KVCacheGroupSpec],
    num_blocks: int,
    nodes: Sequence[HoldsBlocks],
    partition: PartitionKind,
) -> None:
    """Compare a pool with what vLLM is going to ask of it (``get_kv_cache_configs``).

    Args:
        vllm_config: The engine's configuration; a length that vLLM chooses may be 1.
        groups: KV groups of the model, which share the pool.
        num_blocks: Blocks of the rank with the fewest.
        nodes: What is reserved.
        partition: What is divided between the nodes.

    Raises:
        ValueError: One request of max_model_len does not fit.
    """
    model, override = vllm_config.model_config, vllm_config.cache_config
    wanted = 1 if model.original_max_model_len == -1 else model.max_model_len
    needed = _blocks_needed(vllm_config, groups, wanted)
    block_size = groups[0].kv_cache_spec.block_size
    if override.num_gpu_blocks_override is not None:
        if override.num_gpu_blocks_override < needed:
            raise ValueError(
                f"num_gpu_blocks_override={override.num_gpu_blocks_override} was "
                f"given. Allowed with max_model_len={wanted}: at least {needed} "
                f"blocks of {block_size} tokens. Raise it or leave it out, or lower "
                "--max-model-len."
            )
    elif num_blocks < needed:
        fits = bisect.bisect_right(
            range(1, wanted),
            num_blocks,
            key=lambda length: _blocks_needed(vllm_config, groups, length),
        )
        # Blocks of a single group hold as many tokens for any request.
        tokens = block_size if len(groups) == 1 else None
        raise ValueError(
            f"One request of {wanted:,} tokens (max_model_len) must fit in the KV "
            f"cache, and the memory nodes hold {fits:,} "
            f"({_held(nodes, tokens)}; vLLM keeps one block of {block_size} empty). "
            + _advice(fits, needed, nodes, partition)
        )


def _blocks_needed(
    vllm_config: VllmConfig, groups: Sequence[KVCacheGroupSpec], length: int
) -> int:
    """Blocks that one request of ``length`` tokens needs in a pool of its own."""
    model, before = vllm_config.model_config, vllm_config.model_config.max_model_len
    # As vLLM itself asks for another length (`_estimate_max_model_len_from_groups`).
    model.max_model_len = length
    try:
        counts = [
            spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
            for spec in (group.kv_cache_spec for group in groups)
        ]
    finally:
        model.max_model_len = before
    # vLLM never hands out one of the blocks.
    return sum(counts) + 1


def _held(nodes: Sequence[HoldsBlocks], tokens: int | None) -> str:
    counts = [(node, min(node.num_blocks)) for node in nodes]
    return ", ".join(
        f"{node.address} "
        + (f"{blocks * tokens:,} tokens" if tokens else f"{blocks:,} blocks")
        + f" in {byte_size(node.kv_bytes)}"
        for node, blocks in counts
    )


def _advice(
    fits: int, needed: int, nodes: Sequence[HoldsBlocks], partition: PartitionKind
) -> str:
    held = [min(node.num_blocks) for node in nodes]
    counts = divide_blocks(needed, tuple(held), partition)
    # Of all ranks; what is reserved is a whole number of blocks.
    bytes_needed = max(
        node.kv_bytes // blocks * count
        for node, blocks, count in zip(nodes, held, counts, strict=True)
    )
    shorter = f"lower --max-model-len to {fits} or less, " if fits else ""
    return (
        f"Allowed: at least {byte_size(bytes_needed)} on each node. Set kv_cache_gib "
        f"to {round_up_gib(bytes_needed)} or more, which the node must have free "
        f"(--kv-cache-gib there), {shorter}or add a memory node."
    )


def round_up_gib(num_bytes: int) -> str:
    """Write GiB with four digits or more, so that they are enough."""
    digits = max(2, 3 - math.floor(math.log10(num_bytes / GIB)))
    return f"{math.ceil(num_bytes / GIB * 10**digits) / 10**digits:.{digits}f}"
