# SPDX-License-Identifier: Apache-2.0
"""The plan covers every block once, in parts of about equal length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm_attn_offload.triton_kernels import DecodeAttentionPlan, plan_decode_attention
from vllm_attn_offload.triton_kernels.tiles import DecodeTile

# One H100: 132 SMs with 3 CTAs each, Llama-3-8B attention.
NUM_SLOTS = 396
TILE = DecodeTile(16, 64, 4, 5, 3)


def make_plan(**changes: object) -> DecodeAttentionPlan:
    arguments: dict[str, object] = {
        "max_num_seqs": 256,
        "num_query_heads": 32,
        "num_kv_heads": 8,
        "head_size": 128,
        "block_size": 16,
        "query_dtype": torch.bfloat16,
        "kv_cache_dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "tile": TILE,
        "num_slots": NUM_SLOTS,
        **changes,
    }
    return DecodeAttentionPlan(**arguments)


def fill(plan: DecodeAttentionPlan, lens: list[int], rows: int = 1) -> np.ndarray:
    starts = torch.arange(len(lens) + 1, dtype=torch.int32) * rows
    plan_decode_attention(plan, starts, torch.tensor(lens, dtype=torch.int32))
    return plan.work[:, : plan.num_items].numpy()


@pytest.mark.parametrize(
    "lens",
    [[1], [65536], [0, 5, 17], [1024] * 256, [65536] + [512] * 63, [900] * 40],
    ids=["one-token", "one-long", "short", "even", "one-long-of-64", "uneven-waves"],
)
def test_plan_covers_every_block_once(lens: list[int]) -> None:
    plan = make_plan()
    work = fill(plan, lens)
    assert plan.num_items <= plan.max_items
    seq, begin, end, partial, first = work[[3, 5, 6, 7, 8]]
    for index, seq_len in enumerate(lens):
        mine = np.argsort(begin[seq == index])
        begins, ends = (x[seq == index][mine] for x in (begin, end))
        assert begins[0] == 0
        assert ends[-1] == -(-seq_len // 16)
        assert (begins[1:] == ends[:-1]).all()
        assert first[seq == index].sum() == 1
        parts = partial[seq == index][mine]
        assert (np.diff(parts) == 1).all()
        assert (len(parts) > 1) == (parts[0] >= 0)
    split = partial[partial >= 0]
    assert sorted(split) == list(range(len(split)))


@pytest.mark.parametrize(
    ("lens", "most"),
    [
        ([65536], 1.1),
        ([4096] * 8, 1.1),
        ([65536] + [512] * 63, 1.25),
        ([65536] + [4096] * 63, 1.15),
        ([1024] * 256, 1.2),
        ([3000] * 60, 1.1),
    ],
    ids=["batch1", "batch8", "1-long-63-short", "1-long-63-mid", "batch256", "batch60"],
)
def test_plan_keeps_every_slot_busy(lens: list[int], most: float) -> None:
    plan = make_plan()
    work = fill(plan, lens)
    # The hardware gives the next item to the first CTA slot that is free.
    free_at = np.zeros(NUM_SLOTS)
    for length in np.repeat(work[6] - work[5], plan.num_kv_heads):
        free_at[free_at.argmin()] += length
    ideal = sum(-(-n // 16) for n in lens) * plan.num_kv_heads / NUM_SLOTS
    assert free_at.max() <= most * ideal


def test_plan_skips_blocks_behind_the_window() -> None:
    work = fill(make_plan(sliding_window=128), [4096])
    assert work[5].min() == (4096 - 128) // 16
    assert work[6].max() == 256


def test_plan_gives_every_tile_of_a_request_its_rows() -> None:
    plan = make_plan(max_query_len=16, max_num_seqs=2, num_slots=1)
    work = fill(plan, [40, 50], rows=16)
    assert sorted(zip(work[3], work[4], strict=True)) == [
        (seq, row) for seq in (0, 1) for row in (0, 16, 32, 48)
    ]


def test_plan_refuses_a_step_that_does_not_fit() -> None:
    plan = make_plan(max_num_seqs=2)
    with pytest.raises(ValueError, match="3 requests; the plan holds 2"):
        fill(plan, [1, 1, 1])
    with pytest.raises(ValueError, match="2 query rows in one request"):
        fill(plan, [4, 4], rows=2)
    for length in (2**30 + 1, 2**31 - 2):
        with pytest.raises(ValueError, match=f"{length} tokens in one request"):
            fill(plan, [4, length])
    starts, lens = torch.arange(2).int(), torch.tensor([40]).int()
    with pytest.raises(ValueError, match="tokens in one request"):
        plan_decode_attention(plan, starts, lens, torch.tensor([2**28]).int())
    with pytest.raises(ValueError, match="not a multiple of num_kv_heads=5"):
        make_plan(num_kv_heads=5)
    with pytest.raises(ValueError, match="kv_cache_dtype=torch.float16"):
        make_plan(kv_cache_dtype=torch.float16)
    with pytest.raises(ValueError, match="head_size=112"):
        make_plan(head_size=112)
