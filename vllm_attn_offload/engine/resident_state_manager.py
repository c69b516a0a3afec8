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
    asks for more than there are, and the request waits or another one is preempted.

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
        self.block_pool = SharedEventQueueBlockPool(
            num_gpu_blocks=kv_cache_spec.pool_size,
            enable_caching=self.enable_caching,
            hash_block_size=block_pool.hash_block_size,
            enable_kv_cache_events=block_pool.enable_kv_cache_events,
            event_owner=block_pool,
        )
        self._null_block = self.block_pool.null_block

    def get_num_blocks_to_allocate(self, *args: Any, **options: Any) -> int:
        """Blocks of the shared pool that a request needs: none, or too many."""
        needed = super().get_num_blocks_to_allocate(*args, **options)
        if needed > self.block_pool.get_num_free_blocks():
            return self._shared_pool.num_gpu_blocks + 1
        return 0


def register_resident_states(vllm_config: VllmConfig) -> None:
    """Tell this process's scheduler which manager such layers have."""
    # Its own first: where any is registered, vLLM registers no others by itself.
    register_all_kvcache_specs(vllm_config)
    KVCacheSpecRegistry.register(
        ResidentStateSpec,
        cast(Any, ResidentStateManager),
        uniform_type_base_spec=MambaSpec,
    )
