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
    is_decode_step,
    shares_written,
)
from vllm_attn_offload.protocol.step import StepMetadata

BLOCK = 16


def decode_step(
    seq_lens: list[int], query_lens: list[int] | None = None
) -> StepMetadata:
    """A decode step of requests with blocks of their own; 0 pads the block table.

    Args:
        seq_lens: Tokens of each request, its rows included.
        query_lens: Rows of each; None: one.
    """
    lens = np.array(seq_lens, np.int32)
    rows = np.array(query_lens or [1] * len(lens), np.int32)
    counts = -(-lens // BLOCK)
    table = np.zeros((len(lens), counts.max()), np.int32)
    ends = counts.cumsum()
    for row, count, end in zip(table, counts, ends, strict=True):
        row[:count] = np.arange(end - count, end) + 1
    slots = [
        int(its_own[position // BLOCK]) * BLOCK + position % BLOCK
        for its_own, length, count in zip(table, lens, rows, strict=True)
        for position in range(length - count, length)
    ]
    return StepMetadata.whole(
        query_start_loc=np.array([0, *rows.cumsum()], np.int32),
        seq_lens=lens,
        slot_mapping=np.array(slots, np.int64),
        block_table=table,
    )


def step_time(
    seq_lens: list[int], query_lens: list[int], cut: int, costs: StepCosts
) -> float:
    """Of two micro-batches in turns, the first of ``cut`` requests."""
    parts = (slice(0, cut), slice(cut, None))
    compute = [costs.row * sum(query_lens[part]) for part in parts]
    attention = [costs.token * sum(seq_lens[part]) for part in parts]
    return max(compute[0], attention[1]) + max(compute[1], attention[0])


@given(
    st.lists(
        st.tuples(st.integers(1, 16), st.integers(0, 5000)), min_size=2, max_size=40
    ),
    st.booleans(),
    st.sampled_from([0.1, 30.0, 512.0, 1e5]),
)
@settings(deadline=None, max_examples=100)
def test_choose_cut_is_the_best(
    requests: list[tuple[int, int]], is_verifying: bool, row: float
) -> None:
    """No other cut is predicted to be faster; no request is in both or in neither."""
    costs = StepCosts(row=row, token=1.0)
    query_lens = [count if is_verifying else 1 for count, _ in requests]
    seq_lens = [
        count + cached for count, (_, cached) in zip(query_lens, requests, strict=True)
    ]
    batch = decode_step(seq_lens, query_lens)
    cut = choose_cut([batch], costs)
    assert cut in batch.query_start_loc[1:-1]
    first, second = cut_batch(batch, cut)
    num_first = first.num_reqs
    best = min(
        step_time(seq_lens, query_lens, at, costs) for at in range(1, len(seq_lens))
    )
    assert step_time(seq_lens, query_lens, num_first, costs) <= best * (1 + 1e-6)
    for name in ("seq_lens", "slot_mapping", "block_table", "query_positions"):
        parts = [getattr(first, name), getattr(second, name)]
        assert (np.concatenate(parts) == getattr(batch, name)).all()
    assert first.num_tokens == cut == first.num_query_rows
    rows = [*np.diff(first.query_start_loc), *np.diff(second.query_start_loc)]
    assert rows == query_lens
    assert first.query_start_loc[0] == second.query_start_loc[0] == 0


def test_choose_cut_balances_what_is_alike() -> None:
    assert choose_cut([decode_step([1000] * 8)], StepCosts()) == 4
    # One long request weighs as much as the others together, where attention counts.
    longs = decode_step([7000] + [1000] * 7)
    assert choose_cut([longs], StepCosts(row=1000.0)) == 2
    assert choose_cut([longs], StepCosts(row=1e6)) == 4
    # One that verifies drafts computes as much as the others together.
    wide = decode_step([1000] * 5, [4, 1, 1, 1, 1])
    assert choose_cut([wide], StepCosts(row=1e6)) == 4
    assert cut_batch(wide, 4)[0].num_reqs == 1


def test_choose_cut_agrees_with_virtual_requests() -> None:
    """Layers with chunked local attention have more requests: none is cut in two."""
    whole = decode_step([1000, 130, 1000], [1, 4, 1])
    virtual = decode_step([40, 64, 2, 40], [1, 2, 2, 1])
    for groups in ([whole, virtual], [virtual, whole]):
        assert choose_cut(groups, StepCosts(row=1e6)) in (1, 5)
        first, second = cut_batch(virtual, 5)
        assert (first.num_reqs, second.num_reqs) == (3, 1)
    assert choose_cut([decode_step([100], [4]), virtual], StepCosts()) is None


def test_other_steps_stay_whole() -> None:
    """One request, a chunk, and requests that only fill a batch."""
    assert choose_cut([decode_step([100])], StepCosts()) is None
    assert choose_cut([decode_step([100], [3])], StepCosts()) is None
    verification = decode_step([100, 40, 9], [4, 1, 3])
    assert is_decode_step(verification, 4)
    assert not is_decode_step(verification, 3)
    assert is_decode_step(decode_step([100, 40]), 1)
    two = decode_step([100, 40])
    padded = StepMetadata.whole(
        np.array([0, 0, 2], np.int32), two.seq_lens, two.slot_mapping, two.block_table
    )
    assert not is_decode_step(padded, 4)


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


def test_shares_written_sees_every_block_of_a_verification() -> None:
    """Sixteen rows may complete two blocks, and their last rows lie in a third."""
    writer = decode_step([3 * BLOCK + 4, 2 * BLOCK + 7], [16, 1])
    assert not shares_written(writer, BLOCK)
    reader = decode_step([3 * BLOCK + 4, 3 * BLOCK + 1], [16, 1])
    reader.block_table[1, :3] = reader.block_table[0, :3]
    assert shares_written(reader, BLOCK)
    # All of its rows are behind what the reader shares.
    earlier = decode_step([3 * BLOCK + 4, 2 * BLOCK + 7], [4, 1])
    earlier.block_table[1, :2] = earlier.block_table[0, :2]
    assert not shares_written(earlier, BLOCK)


def test_shares_written_ignores_what_lies_behind_a_request() -> None:
    """Block tables keep ids of earlier requests behind their end."""
    batch = decode_step([2 * BLOCK, 5, 9 * BLOCK])
    batch.block_table[1, 1:] = batch.block_table[0, 1]
    assert not shares_written(batch, BLOCK)
