# SPDX-License-Identifier: Apache-2.0
"""vLLM's own plan of a KV cache, which its versions are asked for in other words."""

from __future__ import annotations

import copy

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


def plan_kv_cache(
    vllm_config: VllmConfig,
    specs: list[dict[str, KVCacheSpec]],
    available_bytes: list[int],
) -> list[KVCacheConfig]:
    """How vLLM is going to divide a KV cache of these sizes.

    Args:
        vllm_config: Its ``max_model_len`` changes where it is to be fitted.
        specs: Each rank's layers. They stay what they are.
        available_bytes: Of each rank.

    Raises:
        ValueError: The KV cache holds no request of ``max_model_len``.
    """
    # What vLLM makes of specs may change them.
    specs = copy.deepcopy(specs)
    try:
        from vllm.v1.core.kv_cache_planning import (
            get_global_kv_cache_groups,
            get_kv_cache_configs,
        )
    except ImportError:  # vLLM 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        return get_kv_cache_configs(vllm_config, specs, available_bytes)
    groups = get_global_kv_cache_groups(vllm_config, specs)
    return get_kv_cache_configs(vllm_config, specs, available_bytes, groups)


def block_bytes(config: KVCacheConfig) -> int:
    """Bytes of a block in vLLM's layout, of the largest group (``size`` is of all)."""
    return config.kv_cache_tensors[0].size // config.num_blocks


def check_groups(planned: KVCacheConfig, given: KVCacheConfig) -> None:
    """Compare what memory was reserved for with what the scheduler is going to use.

    Raises:
        RuntimeError: vLLM grouped the layers in another way than before.
    """
    if planned.kv_cache_groups != given.kv_cache_groups or block_bytes(
        planned
    ) != block_bytes(given):
        raise RuntimeError(
            f"vLLM made {len(given.kv_cache_groups)} KV groups of this model with "
            f"{block_bytes(given):,} bytes a block. Memory nodes were asked for "
            f"{len(planned.kv_cache_groups)} groups with {block_bytes(planned):,} "
            "bytes. Run this model without --attention-offload, and report it."
        )
