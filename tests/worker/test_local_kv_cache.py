# SPDX-License-Identifier: Apache-2.0
"""What a worker allocates of a hybrid model's KV cache, with vLLM's own functions."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_attn_offload.worker.local_kv_cache import LocalKVCacheConfig
from vllm_attn_offload.worker.resident_state import ResidentStateSpec

NUM_BLOCKS, NUM_STATES = 1000, 7
ATTENTION = FullAttentionSpec(
    block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32
)
# 3 x 10 numbers of 2 bytes, then 4 x 8 of 4 bytes: 188, which is no multiple of 64.
STATE = MambaSpec(
    block_size=16,
    shapes=((3, 10), (4, 8)),
    dtypes=(torch.bfloat16, torch.float32),
    page_size_padded=ATTENTION.page_size_bytes,
)
ATTENDING, RECURRENT = ["a.0", "a.1"], [["m.0", "m.1"], ["m.2", "m.3"]]


def planned(num_blocks: int) -> KVCacheConfig:
    """Two layers that attend and four that do not, in groups of two."""
    page = ATTENTION.page_size_bytes
    states = ResidentStateSpec.of(STATE, NUM_STATES, max_per_request=1)
    groups = [KVCacheGroupSpec(ATTENDING, ATTENTION)]
    groups += [KVCacheGroupSpec(names, states) for names in RECURRENT]
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=2 * page * num_blocks,
                layers=group.layer_names,
                layer_stride=page * num_blocks,
                block_stride=page,
            )
            for group in groups
        ],
        kv_cache_groups=groups,
    )


def test_bytes() -> None:
    """One block of the layers that attend, N states of each other one; no more."""
    local = LocalKVCacheConfig.of(planned(NUM_BLOCKS))
    assert local.state_bytes == 4 * NUM_STATES * 192
    assert {tensor.size for tensor in local.kv_cache_tensors} == {
        2 * ATTENTION.page_size_bytes + local.state_bytes
    }
    assert local.smallest_pool(NUM_BLOCKS) == NUM_STATES


def test_nothing_overlaps() -> None:
    """Every layer's block and states have bytes that no other layer has."""
    local = LocalKVCacheConfig.of(planned(NUM_BLOCKS))
    views = allocate_kv_cache(local, torch.device("cpu"), KVCacheLayout.LBHNC)
    assert views.keys() == {*ATTENDING, *RECURRENT[0], *RECURRENT[1]}
    for names in RECURRENT:
        for name in names:
            assert views[name].shape == (NUM_STATES, 1, 1, 188)
    for number, view in enumerate(views.values(), 1):
        view.fill_(number)
    for number, (name, view) in enumerate(views.items(), 1):
        assert (view == number).all(), name


@pytest.mark.parametrize("num_blocks", [1, 10])
def test_the_plan_is_kept(num_blocks: int) -> None:
    """The scheduler goes on with it."""
    config = planned(num_blocks)
    LocalKVCacheConfig.of(config)
    assert config == planned(num_blocks)
