# SPDX-License-Identifier: Apache-2.0
"""Where decode steps are cut, and which are not."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_attn_offload.attention.micro_batch.split import (
    StepCosts,
    choose_cut,
    cut_batch,
    shares_written,
)
from vllm_attn_offload.protocol.step import StepMetadata

BLOCK = 16


def decode_step(seq_lens: list[int]) -> StepMetadata:
    """A decode step of requests with blocks of their own; 0 pads the block table."""
    lens = np.array(seq_lens, np.int32)
    counts = -(-lens // BLOCK)
    table = np.zeros((len(lens), counts.max()), np.int32)
    ends = counts.cumsum()
    for row, count, end in zip(table, counts, ends, strict=True):
        row[:count] = np.arange(end - count, end) + 1
    last = table[np.arange(len(lens)), counts - 1].astype(np.int64)
    return StepMetadata.whole(
        query_start_loc=np.arange(len(lens) + 1, dtype=np.int32),
        seq_lens=lens,
        slot_mapping=last * BLOCK + (lens - 1) % BLOCK,
        block_table=table,
    )


def step_time(seq_lens: list[int], cut: int, costs: StepCosts) -> float:
    """Of two micro-batches in turns."""
    halves = (seq_lens[:cut], seq_lens[cut:])
    compute = [costs.row * len(half) for half in halves]
    attention = [costs.token * sum(half) for half in halves]
    return max(compute[0], attention[1]) + max(compute[1], attention[0])


@given(
    st.lists(st.integers(1, 5000), min_size=2, max_size=40),
    st.sampled_from([0.1, 30.0, 512.0, 1e5]),
)
@settings(deadline=None, max_examples=60)
def test_choose_cut_is_the_best(seq_lens: list[int], row: float) -> None:
    """No other cut is predicted to be faster; no request is in both or in neither."""
    costs = StepCosts(row=row, token=1.0)
    batch = decode_step(seq_lens)
    cut = choose_cut(batch, costs)
    assert cut is not None
    best = min(step_time(seq_lens, at, costs) for at in range(1, len(seq_lens)))
    assert step_time(seq_lens, cut, costs) <= best * (1 + 1e-6)
    first, second = cut_batch(batch, cut)
    for name in ("seq_lens", "slot_mapping", "block_table"):
        parts = [getattr(first, name), getattr(second, name)]
        assert (np.concatenate(parts) == getattr(batch, name)).all()
    assert first.query_start_loc.tolist() == list(range(cut + 1))
    assert second.query_start_loc.tolist() == list(range(len(seq_lens) - cut + 1))


def test_choose_cut_balances_what_is_alike() -> None:
    assert choose_cut(decode_step([1000] * 8), StepCosts()) == 4
    # One long request weighs as much as the others together, where attention counts.
    longs = decode_step([7000] + [1000] * 7)
    assert choose_cut(longs, StepCosts(row=1000.0)) == 2
    assert choose_cut(longs, StepCosts(row=1e6)) == 4


def test_choose_cut_leaves_other_steps_whole() -> None:
    """One request, and a step in which two tokens of a request are computed."""
    assert choose_cut(decode_step([100]), StepCosts()) is None
    two = decode_step([100, 40])
    chunk = StepMetadata.whole(
        np.array([0, 0, 2], np.int32), two.seq_lens, two.slot_mapping, two.block_table
    )
    assert choose_cut(chunk, StepCosts()) is None


def test_choose_cut_keeps_a_reader_with_its_writer() -> None:
    """A prompt cached up to its last token reads the block that is filled just now."""
    writer_len = 3 * BLOCK
    batch = decode_step([writer_len, writer_len + 1])
    assert not shares_written(batch, BLOCK)
    batch.block_table[1, :3] = batch.block_table[0, :3]
    assert shares_written(batch, BLOCK)
    # A block that was filled by an earlier step is shared like any other.
    later = decode_step([writer_len + 1, writer_len + 1])
    later.block_table[1, :3] = later.block_table[0, :3]
    assert not shares_written(later, BLOCK)


def test_shares_written_ignores_what_lies_behind_a_request() -> None:
    """Block tables keep ids of earlier requests behind their end."""
    batch = decode_step([2 * BLOCK, 5, 9 * BLOCK])
    batch.block_table[1, 1:] = batch.block_table[0, 1]
    assert not shares_written(batch, BLOCK)
