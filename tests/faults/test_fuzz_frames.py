# SPDX-License-Identifier: Apache-2.0
"""STEP and LAYER frames that are almost right, sent to sessions of a real node."""

from __future__ import annotations

from contextlib import closing, suppress

import torch
from fuzzing import ROUND, broken_bytes, fuzz
from hypothesis import given
from hypothesis import strategies as st
from node_process import NodeProcess
from paged_batch import PagedBatch
from raw_session import RawSession, encode_step, make_geometry

from vllm_attn_offload.memory_node.step import AttentionStep
from vllm_attn_offload.protocol import (
    FRAME_HEADER_BYTES,
    FrameFlag,
    FrameHeader,
    FrameKind,
)

NUM_BLOCKS = 8
GEOMETRY = make_geometry(num_query_heads=4, num_kv_heads=2, head_size=16, block_size=16)


def frame(header: FrameHeader, payload: memoryview) -> bytes:
    header.num_bytes = payload.nbytes
    packed = bytearray(FRAME_HEADER_BYTES)
    header.pack_into(packed)
    return bytes(packed) + bytes(payload)


def layers(step: int, qkv: torch.Tensor, flags: int) -> list[bytes]:
    payload = qkv.contiguous().view(torch.uint8).numpy().data.cast("B")
    return [
        frame(FrameHeader(FrameKind.LAYER, layer, step, flags=flags), payload)
        for layer in (0, 1)
    ]


def real_frames() -> list[bytes]:
    """Two steps of two requests: prefill and decode, stored only and attended."""
    batch = PagedBatch(GEOMETRY, NUM_BLOCKS, 2)
    frames = []
    for number, num_new in enumerate(([5, 3], [1, 1]), 1):
        step, qkv = batch.grow(num_new)
        frames.append(
            frame(FrameHeader(FrameKind.STEP, step=number), encode_step(step))
        )
        for flags in (FrameFlag.FUSED, FrameFlag.FUSED | FrameFlag.WANT_LSE):
            frames += layers(number, qkv, flags)
        frames += layers(number, qkv, FrameFlag.NONE)
        stored = AttentionStep(
            step.query_start_loc[:1],
            step.seq_lens[:0],
            step.slot_mapping,
            step.block_table[:0],
        )
        header = FrameHeader(FrameKind.STEP, step=10 + number)
        frames.append(frame(header, encode_step(stored)))
        kv = qkv[:, 4 * 16 :]
        frames += layers(10 + number, kv, FrameFlag.WANT_ACK)
        frames += layers(10 + number, kv, FrameFlag.NONE)
    return frames


FRAMES = real_frames()


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Frames in their order, and then a few that are broken or out of place."""
    stream = FRAMES[: draw(st.integers(0, len(FRAMES)))]
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(stream)))
        seed = draw(st.sampled_from(FRAMES))
        if draw(st.booleans()) and position < len(stream):
            seed = stream.pop(position)
        # Header and the counts in front of a STEP decide how the rest is read.
        stream.insert(position, draw(broken_bytes(seed, front=128)))
    return b"".join(stream)


def converse(address: str, stream: bytes) -> list[int]:
    """Send a stream on a session of its own; kinds of the frames that came back."""
    kinds = []
    with closing(RawSession(address, GEOMETRY, NUM_BLOCKS)) as session:
        with suppress(ConnectionError):
            session.send_raw(stream)
        session.end_sending()
        with suppress(ConnectionError):
            while True:
                kind, payload = session.receive()
                assert len(payload) < 1 << 20
                kinds.append(kind)
    assert FrameKind.ERROR not in kinds[:-1]
    assert set(kinds) <= {FrameKind.OUT, FrameKind.ERROR}
    return kinds


def test_real_frames_are_served(unharmed: NodeProcess) -> None:
    """The seeds are what they claim to be."""
    # Per step: attended three times, and acknowledged once, on two layers each.
    kinds = converse(unharmed.address, b"".join(FRAMES))
    assert kinds == 2 * (3 + 1) * 2 * [FrameKind.OUT]


def test_streams(unharmed: NodeProcess) -> None:
    @ROUND
    @given(streams())
    def one_round(stream: bytes) -> None:
        converse(unharmed.address, stream)

    fuzz(one_round)
