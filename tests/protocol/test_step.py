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
    read_step,
    step_num_bytes,
    write_step,
)

LIMITS = StepLimits(
    num_blocks=10,
    block_size=16,
    max_num_tokens=64,
    max_num_reqs=4,
    max_blocks_per_req=5,
)
INT32 = np.iinfo(np.int32)


def valid_step(**changes: Any) -> StepMetadata:
    """One row over 33 tokens, and three over 20; four tokens are stored."""
    step = StepMetadata(
        query_start_loc=np.array([0, 1, 4], np.int32),
        seq_lens=np.array([33, 20], np.int32),
        slot_mapping=np.array([9 * 16, 17, -1, 19], np.int64),
        block_table=np.array([[3, 7, 9], [4, 1, -77]], np.int32),
    )
    return replace(step, **{name: np.array(value) for name, value in changes.items()})


def encode(step: StepMetadata) -> memoryview:
    num_reqs, width = step.block_table.shape
    buffer = memoryview(bytearray(step_num_bytes(num_reqs, step.num_tokens, width)))
    assert write_step(step, buffer) == buffer.nbytes
    return buffer


def test_round_trip() -> None:
    step = valid_step()
    read = read_step(encode(step), LIMITS)
    assert (read.num_reqs, read.num_tokens) == (2, 4)
    for name in ("query_start_loc", "seq_lens", "slot_mapping", "block_table"):
        array = getattr(read, name)
        np.testing.assert_array_equal(array, getattr(step, name))
        assert array.dtype == getattr(step, name).dtype


@pytest.mark.parametrize("num_reqs", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_round_trip_alignment(num_reqs: int, width: int) -> None:
    step = StepMetadata(
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
        (
            {"seq_lens": [161, 20]},
            "161 tokens in a request; this session",
        ),
        ({"seq_lens": [INT32.max, 20]}, "2,147,483,647 tokens in a request; this"),
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


def test_read_step_refuses_wrapping_differences() -> None:
    """Starts whose int32 differences are all positive, though they fall."""
    limits = replace(LIMITS, max_blocks_per_req=1 << 22, block_size=1 << 16)
    width = (INT32.max >> 16) + 1
    step = StepMetadata(
        query_start_loc=np.array([0, INT32.max, INT32.min, -1, 4], np.int32),
        seq_lens=np.full(4, INT32.max, np.int32),
        slot_mapping=np.zeros(4, np.int64),
        block_table=np.zeros((4, width), np.int32),
    )
    with pytest.raises(ProtocolError, match="query_start_loc must rise from 0"):
        read_step(encode(step), limits)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ((5, 4, 3, 4), "5 requests; this session allows 0 to 4"),
        ((2, 65, 3, 4), "65 tokens; this session allows 0 to 64"),
        ((2, 4, (1 << 32) - 1, 4), "4,294,967,295 block-table columns"),
        ((2, 4, 3, 65), "65 query rows; this session allows 0 to 64"),
        ((2, 4, 3, 5), "query_start_loc must rise from 0"),
        ((2, 5, 3, 4), "96 bytes for 2 requests, 5 tokens and 3 columns; 104 "),
    ],
)
def test_read_step_refuses_counts(prefix: tuple[int, ...], message: str) -> None:
    payload = encode(valid_step())
    payload[:16] = struct.pack("<IIII", *prefix)
    with pytest.raises(ProtocolError, match=message):
        read_step(payload, LIMITS)


@pytest.mark.parametrize("num_bytes", [0, 15, 16, 95])
def test_read_step_refuses_truncation(num_bytes: int) -> None:
    with pytest.raises(ProtocolError, match=f"STEP frame of {num_bytes} bytes"):
        read_step(encode(valid_step())[:num_bytes], LIMITS)
