# SPDX-License-Identifier: Apache-2.0
"""Draft models whose layers vLLM's model runner would give other layers' blocks."""

from __future__ import annotations

import pytest
import torch
from harness import tiny_llama
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    SlidingWindowSpec,
)

from vllm_attn_offload.engine.kv_cache_plan import plan_kv_cache
from vllm_attn_offload.worker.draft_groups import check_draft_groups

FULL, LOCAL = "full", "local"
#: With a layer that drafts vLLM makes two groups of four of these.
WHOLE = {f"layers.{index}": FULL for index in range(3)}
WINDOWS = {f"layers.{index}": LOCAL for index in range(3, 7)}
DRAFT = {"draft_model.0": FULL}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    tiny_llama.save(directory)
    return str(directory)


def configure(
    model: str, method: str = "draft_model", *, has_hma: bool = True
) -> VllmConfig:
    speculation = {"method": method, "num_speculative_tokens": 3}
    if method == "draft_model":
        speculation["model"] = model
    config = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        disable_hybrid_kv_cache_manager=not has_hma,
        speculative_config=speculation,
        **tiny_llama.engine_options(),
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"  # the engine core chooses it
    return config


def group(config: VllmConfig, kinds: dict[str, str]) -> KVCacheConfig:
    """As vLLM groups layers of these kinds."""
    shape = {"block_size": 32, "num_kv_heads": 2, "head_size": 32}
    specs = {
        name: FullAttentionSpec(**shape, dtype=torch.float32)
        if kind == FULL
        else SlidingWindowSpec(**shape, dtype=torch.float32, sliding_window=64)
        for name, kind in kinds.items()
    }
    (planned,) = plan_kv_cache(config, [specs], [1 << 24])
    return planned


def test_layers_outside_the_first_group_are_refused(model: str) -> None:
    """It is that of the first layer: a window, or all tokens."""
    config = configure(model)
    planned = group(config, WHOLE | WINDOWS | DRAFT)
    assert [len(each.layer_names) for each in planned.kv_cache_groups] == [4, 4]
    check_draft_groups(config, planned)
    planned = group(config, WINDOWS | WHOLE | DRAFT)
    message = (
        r"1 layer\(s\) of a draft model outside the first of 2 KV cache groups: "
        r"draft_model\.0\. Allowed: draft models whose layers .* Choose another method"
    )
    with pytest.raises(ValueError, match=message):
        check_draft_groups(config, planned)


def test_one_group_is_accepted(model: str) -> None:
    """Also where vLLM was told to make one of what could be two."""
    config = configure(model)
    check_draft_groups(config, group(config, WHOLE | DRAFT))
    config = configure(model, has_hma=False)
    planned = group(config, WINDOWS | WHOLE | DRAFT)
    assert len(planned.kv_cache_groups) == 1
    check_draft_groups(config, planned)


def test_other_methods_are_accepted(model: str) -> None:
    """Their layers have other names; vLLM looks for the group of a head."""
    config = configure(model, "ngram")
    check_draft_groups(config, group(config, WINDOWS | WHOLE))
