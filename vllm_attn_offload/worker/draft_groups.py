# SPDX-License-Identifier: Apache-2.0
"""KV cache groups in which vLLM lets a draft model work."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

#: Of the names of a draft model's layers, in both of vLLM's model runners.
_PREFIX = "draft_model."


def check_draft_groups(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse a draft model with layers outside the first KV group.

    vLLM's model runner looks for the group of a draft head, but hands the first group's
    slots and block tables to every draft model (`_build_attention_metadata`): its
    layers would overwrite blocks of other requests.

    Args:
        vllm_config: The worker's configuration.
        kv_cache_config: How vLLM groups its layers.

    Raises:
        ValueError: A layer of the draft model is in another group.
    """
    speculation = vllm_config.speculative_config
    if speculation is None or not speculation.uses_draft_model():
        return
    outside = [
        name
        for group in kv_cache_config.kv_cache_groups[1:]
        for name in group.layer_names
        if name.startswith(_PREFIX)
    ]
    if outside:
        raise ValueError(
            f"Attention offloading does not support {len(outside)} layer(s) of a draft "
            f"model outside the first of {len(kv_cache_config.kv_cache_groups)} KV "
            f"cache groups: {outside[0]}. Allowed: draft models whose layers are all "
            "in the first group, as with targets without windows. Choose another "
            "method in --speculative-config, or pass "
            "--disable-hybrid-kv-cache-manager."
        )
