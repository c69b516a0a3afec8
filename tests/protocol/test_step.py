# SPDX-License-Identifier: Apache-2.0
"""The STEP frame: it survives the wire, and nothing hostile in it gets through."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_attn_offload.errors import ProtocolError
from vllm_attn_offload.protocol.step import (
    StepLimits,
    StepMetadata,
    write_step,
)
from vllm_attn_offload.protocol.step_reader import read_step, read_worker_times

LIMITS = StepLimits(
    num_blocks=10,
    block_size=16,
    max_num_tokens=64,
    max_num_reqs=4,
    max_blocks_per_req=5,
)
INT32 = np.iinfo(np.int32)
ARRAYS = ("query_start_loc", "seq_lens", "slot_mapping", "block_table")
ARRAYS += ("query_positions", "first_block")


def valid_step(**changes: Any) -> StepMetadata:
    """One row over 33 tokens, and three over 20; four tokens are stored."""
    step = StepMetadata.whole(
        query_start_loc=np.array([0, 1, 4], np.int32),
        seq_lens=np.array([33, 20], np.int32),
        slot_mapping=np.array([9 * 16, 17, -1, 19], np.int64),
        block_table=np.array([[3, 7, 9], [4, 1, -77]], np.int32),
    )
    return replace(step, **{name: np.array(value) for name, value in changes.items()})


def divided_step(**changes: Any) -> StepMetadata:
    """Blocks 1 and 2 of a request of 33 tokens, block 0 of one of 20."""
    indices = np.array([[1, 2, -1], [0, -1, -1]], np.int32)
    return valid_step(**({"block_indices": indices} | changes))


def encode(step: StepMetadata) -> memoryview:
    buffer = memoryview(bytearray(step.num_bytes))
    assert write_step(step, buffer) == buffer.nbytes
    return buffer


def test_round_trip() -> None:
    step = valid_step()
    read = read_step(encode(step), LIMITS)
    assert (read.num_reqs, read.num_tokens) == (2, 4)
    assert read.block_indices is None
    for name in ARRAYS:
        array = getattr(read, name)
        np.testing.assert_array_equal(array, getattr(step, name))
        assert array.dtype == getattr(step, name).dtype


def test_round_trip_of_a_part() -> None:
    """Indices say which of a request's blocks are here, and how long each is."""
    step = divided_step()
    read = read_step(encode(step), LIMITS)
    np.testing.assert_array_equal(read.block_indices, step.block_indices)
    np.testing.assert_array_equal(read.num_columns(16), [2, 1])
    np.testing.assert_array_equal(read.tokens_held(16), [16 + 1, 16])


def test_a_table_may_begin_late() -> None:
    """What a window does not show is not listed, however long a request is."""
    step = valid_step(
        seq_lens=[1_000_003, 20],
        first_block=[62_498, 0],
        query_positions=[1_000_002, 17],
    )
    read = read_step(encode(step), LIMITS)
    np.testing.assert_array_equal(read.num_columns(16), [3, 2])
    np.testing.assert_array_equal(read.tokens_held(16), [35, 20])
    assert read.num_bytes <= LIMITS.max_step_bytes


@pytest.mark.parametrize("num_reqs", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_round_trip_alignment(num_reqs: int, width: int) -> None:
    step = StepMetadata.whole(
        query_start_loc=np.arange(num_reqs + 1, dtype=np.int32),
        seq_lens=np.full(num_reqs, 16 * width, np.int32),
        slot_mapping=np.arange(num_reqs, dtype=np.int64) + (1 << 3),
        block_table=np.arange(num_reqs * width, dtype=np.int32).reshape(num_reqs, width)
        % LIMITS.num_blocks,
    )
    read = read_step(encode(step), LIMITS)
    np.testing.assert_array_equal(read.slot_mapping, step.slot_mapping)
    np.testing.assert_array_equal(read.block_table, step.block_table)
    assert encode(step).nbytes <= LIMITS.max_step_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_start_loc": [1, 2, 4]}, "query_start_loc must rise from 0"),
        ({"query_start_loc": [0, 5, 4]}, "query_start_loc must rise from 0"),
        (
            {"seq_lens": [-1, 20]},
            "-1 tokens in a request; this session",
        ),
        ({"seq_lens": [49, 20]}, "49 tokens needs 4 blocks; the step lists 3"),
        ({"seq_lens": [161, 20]}, "11 blocks of a request; this session allows 0 to"),
        ({"seq_lens": [INT32.max, 20]}, "2,147,483,647 tokens in a request; this"),
        ({"query_positions": [-1, 17]}, "-1 as the position of a query row"),
        ({"query_positions": [1 << 30, 17]}, "1,073,741,825 as the position after"),
        ({"query_positions": [INT32.max, 17]}, "2,147,483,647 as the position of"),
        ({"first_block": [-1, 0]}, "-1 as the index of a first block"),
        ({"first_block": [(1 << 26) + 1, 0]}, "67,108,865 as the index of a first"),
        ({"block_table": [[3, 10, 9], [4, 1, 0]]}, "block ids from 1 to 10"),
        ({"block_table": [[3, 7, 9], [-1, 1, 0]]}, "block ids from -1 to 9"),
        ({"slot_mapping": [160, 1, 2, 3]}, "slots from 1 to 160"),
        ({"slot_mapping": [-2, 1, 2, 3]}, "slots from -2 to 3"),
        ({"slot_mapping": [1 << 62, 1, 2, 3]}, "this session has slots 0 to 159"),
    ],
)
def test_read_step_refuses(changes: dict[str, Any], message: str) -> None:
    payload = encode(valid_step(**changes))
    with pytest.raises(ProtocolError, match=message):
        read_step(payload, LIMITS)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[2, 1, -1], [0, -1, -1]], "block_indices must rise"),
        ([[1, 1, -1], [0, -1, -1]], "block_indices must rise"),
        ([[1, -1, 2], [0, -1, -1]], "block_indices must rise"),
        ([[1, 2, -2], [0, -1, -1]], "-2 as the index of a block"),
        ([[1, 2, (1 << 26) + 1], [0, -1, -1]], "67,108,865 as the index of a block"),
        ([[1, 2, INT32.max], [0, -1, -1]], "2,147,483,647 as the index of a block"),
    ],
)
def test_read_step_refuses_indices(indices: list[list[int]], message: str) -> None:
    payload = encode(divided_step(block_indices=np.array(indices, np.int32)))
    with pytest.raises(ProtocolError, match=message):
        read_step(payload, LIMITS)


def test_read_step_refuses_wrapping_differences() -> None:
    """Starts whose int32 differences are all positive, though they fall."""
    limits = replace(LIMITS, max_blocks_per_req=1 << 22, block_size=1 << 16)
    width = (INT32.max >> 16) + 1
    step = StepMetadata(
        query_start_loc=np.array([0, INT32.max, INT32.min, -1, 4], np.int32),
        seq_lens=np.full(4, INT32.max, np.int32),
        slot_mapping=np.zeros(4, np.int64),
        block_table=np.zeros((4, width), np.int32),
        query_positions=np.zeros(4, np.int32),
        first_block=np.zeros(4, np.int32),
    )
    with pytest.raises(ProtocolError, match="query_start_loc must rise from 0"):
        read_step(encode(step), limits)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ((5, 4, 3, 4, 0), "5 requests; this session allows 0 to 4"),
        ((2, 65, 3, 4, 0), "65 tokens; this session allows 0 to 64"),
        ((2, 4, (1 << 32) - 1, 4, 0), "4,294,967,295 block-table columns"),
        ((2, 4, 3, 65, 0), "65 query rows; this session allows 0 to 64"),
        ((2, 4, 3, 5, 0), "query_start_loc must rise from 0"),
        ((2, 5, 3, 4, 0), "136 bytes for 2 requests, 5 tokens and 3 columns; 144 "),
        ((2, 4, 3, 4, 1), "136 bytes for 2 requests, 4 tokens and 3 columns; 160 "),
        ((2, 4, 3, 4, 2), "2 tables of block indices; this session allows 0 to 1"),
    ],
)
def test_read_step_refuses_counts(prefix: tuple[int, ...], message: str) -> None:
    payload = encode(valid_step())
    payload[:20] = struct.pack("<IIIII", *prefix)
    with pytest.raises(ProtocolError, match=message):
        read_step(payload, LIMITS)


@pytest.mark.parametrize("num_bytes", [0, 19, 20, 111])
def test_read_step_refuses_truncation(num_bytes: int) -> None:
    with pytest.raises(ProtocolError, match=f"STEP frame of {num_bytes} bytes"):
        read_step(encode(valid_step())[:num_bytes], LIMITS)


def test_worker_times() -> None:
    """What a worker tells of its own time survives the wire, whatever it is."""
    step = valid_step()
    buffer = memoryview(bytearray(step.num_bytes))
    most = (1 << 64) - 1
    write_step(step, buffer, (1_500_000_000, 0, most))
    read_step(buffer, LIMITS)
    assert read_worker_times(buffer) == (1.5, 0.0, most / 1e9)
    write_step(step, buffer)
    assert read_worker_times(buffer) == (0.0, 0.0, 0.0)
