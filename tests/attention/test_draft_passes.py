# SPDX-License-Identifier: Apache-2.0
"""Metadata of a drafter's passes: vLLM changes one description from pass to pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import tiny_llama
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention import selector
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_attn_offload.attention.layers import mark_drafter_layers
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadataBuilder
from vllm_attn_offload.plugin import BACKEND_PATH

BLOCK_SIZE = 16
NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    tiny_llama.save(directory)
    return str(directory)


@pytest.fixture
def offloading_backend() -> Iterator[None]:
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND_PATH)
    selector._cached_get_attn_backend.cache_clear()
    yield
    AttentionBackendEnum.CPU_ATTN.clear_override()
    selector._cached_get_attn_backend.cache_clear()


def config_of(model: str, speculation: dict[str, Any] | None) -> VllmConfig:
    options = tiny_llama.engine_options() | {"skip_tokenizer_init": True}
    if speculation is not None:
        options["speculative_config"] = speculation
    return EngineArgs(model, **options).create_engine_config()


def builder(config: VllmConfig, name: str) -> AttentionOffloadMetadataBuilder:
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=torch.float32
    )
    return AttentionOffloadMetadataBuilder(spec, [name], config, torch.device("cpu"))


def description(query_lens: list[int], seq_lens: list[int]) -> CommonAttentionMetadata:
    """As the model runner makes it, with lengths in tensors that it keeps."""
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
    num_tokens = int(starts[-1])
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(seq_lens),
        num_actual_tokens=num_tokens,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(40, dtype=torch.int32).reshape(2, 20),
        slot_mapping=torch.arange(num_tokens),
    )


def test_every_pass_is_a_step(model: str) -> None:
    """Builders of one pass share its metadata; passes share nothing."""
    config = config_of(model, NGRAM)
    target, other, draft, last = (builder(config, name) for name in "abcd")
    common = description([4, 1], [40, 9])
    verified = target.build(0, common)
    assert other.build(0, common) is verified
    passes = [draft.build_for_drafting(common, 0)]
    assert passes[0] is not verified
    assert last.build_for_drafting(common, 0) is passes[0]
    common.query_start_loc_cpu = torch.arange(3, dtype=torch.int32)
    common.seq_lens -= torch.tensor([2, 0])
    for index in (1, 2):
        common.seq_lens += 1
        common.slot_mapping = torch.arange(2) + 100 * index
        passes.append(draft.build_for_drafting(common, index))
        assert last.build_for_drafting(common, index) is passes[-1]
    lens = [each.batch.seq_lens.tolist() for each in (verified, *passes)]
    assert lens == [[40, 9], [40, 9], [39, 10], [40, 11]]
    slots = [each.batch.slot_mapping.tolist() for each in passes]
    assert slots == [[0, 1, 2, 3, 4], [100, 101], [200, 201]]
    assert [each.num_tokens for each in passes] == [5, 2, 2]
    # Only groups of one step announce each other.
    assert not [each for each in (verified, *passes) if each.later is not None]
    following = target.build(0, description([4, 4], [44, 13]))
    assert following is not passes[-1]
    assert following.batch.seq_lens.tolist() == [44, 13]


def test_groups_of_a_drafter_have_no_part_in_the_target_step(
    model: str, offloading_backend: None
) -> None:
    """Wherever they are among the target's, which announce each other."""
    config = config_of(model, NGRAM)
    with set_current_vllm_config(config):
        target = torch.nn.ModuleList(
            Attention(1, 16, 1.0, prefix=name) for name in ("first", "second")
        )
        Attention(1, 16, 1.0, prefix="draft")
    mark_drafter_layers(config, target)
    whole = description([4, 1], [40, 9])
    first, draft, second = (
        builder(config, name).build(0, copy.copy(whole))
        for name in ("first", "draft", "second")
    )
    assert [each.is_drafter for each in (first, draft, second)] == [False, True, False]
    assert first.later is second
    assert draft.later is second.later is None
    common = copy.copy(whole)
    shared = builder(config, "draft").build(0, common)
    assert builder(config, "first").build(0, common) is shared
    assert not shared.is_drafter


@pytest.mark.parametrize(
    ("speculation", "threshold"),
    [
        (None, 1),
        (NGRAM, 4),
        # Its first pass has one row more than the verification.
        ({"method": "draft_model", "num_speculative_tokens": 3}, 5),
        ({"method": "draft_model", "num_speculative_tokens": 15}, 16),
    ],
    ids=["none", "ngram", "draft model", "longest"],
)
def test_rows_that_decode(
    model: str, speculation: dict[str, Any] | None, threshold: int
) -> None:
    if speculation is not None and speculation["method"] == "draft_model":
        speculation = speculation | {"model": model}
    made = builder(config_of(model, speculation), "a")
    assert made.build(0, description([1, 1], [4, 5])).decode_threshold == threshold
