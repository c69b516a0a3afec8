# SPDX-License-Identifier: Apache-2.0
"""Hands out recurrent states from a pool of their own, on the compute node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vllm.v1.core.single_type_kv_cache_manager import (
    MambaManager,
    register_all_kvcache_specs,
)
from vllm.v1.hisparse.block_pool import SharedEventQueueBlockPool
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_attn_offload.worker.resident_state import ResidentStateSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool


class ResidentStateManager(MambaManager):
    """vLLM's manager of recurrent states over a pool that no other group uses.

    The scheduler compares what all groups need with the shared pool, whose blocks are
    on the memory nodes. This group needs none of them; where its own pool is short it
    asks for more than there are, and the request waits or another one is preempted. A
    request that holds none waits until all that it may hold are left, so that those
    that run find the next one when they come to the end of a block.

    Args:
        kv_cache_spec: Says how many states there are.
        block_pool: The pool of the memory nodes.
        options: As vLLM gives them to its own manager.
    """

    def __init__(
        self, kv_cache_spec: ResidentStateSpec, block_pool: BlockPool, **options: Any
    ) -> None:
        super().__init__(kv_cache_spec, block_pool, **options)
        self._shared_pool = block_pool
        self._max_requests = (
            kv_cache_spec.pool_size - 1
        ) // kv_cache_spec.max_per_request
        self.block_pool = SharedEventQueueBlockPool(
            num_gpu_blocks=kv_cache_spec.pool_size,
            enable_caching=self.enable_caching,
            hash_block_size=block_pool.hash_block_size,
            enable_kv_cache_events=block_pool.enable_kv_cache_events,
            event_owner=block_pool,
        )
        self._null_block = self.block_pool.null_block

    def get_num_blocks_to_allocate(
        self, request_id: str, *args: Any, **options: Any
    ) -> int:
        """Blocks of the shared pool that a request needs: none, or too many."""
        needed = super().get_num_blocks_to_allocate(request_id, *args, **options)
        is_short = needed > self.block_pool.get_num_free_blocks()
        if is_short or self._is_one_too_many(request_id):
            return self._shared_pool.num_gpu_blocks + 1
        return 0

    def _is_one_too_many(self, request_id: str) -> bool:
        if self.req_to_blocks.get(request_id):
            return False
        return sum(map(bool, self.req_to_blocks.values())) >= self._max_requests


def register_resident_states(vllm_config: VllmConfig) -> None:
    """Tell this process's scheduler which manager such layers have."""
    # Its own first: where any is registered, vLLM registers no others by itself.
    register_all_kvcache_specs(vllm_config)
    KVCacheSpecRegistry.register(
        ResidentStateSpec,
        cast(Any, ResidentStateManager),
        uniform_type_base_spec=MambaSpec,
    )
