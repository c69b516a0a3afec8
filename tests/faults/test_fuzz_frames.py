# SPDX-License-Identifier: Apache-2.0
"""STEP and LAYER frames that are almost right, sent to sessions of a real node."""

from __future__ import annotations

from contextlib import closing, suppress

import pytest
from fuzzing import ROUND, broken_bytes, fuzz
from hypothesis import given
from hypothesis import strategies as st
from node_process import NodeProcess
from raw_session import RawSession
from real_frames import (
    EDGE_FRAMES,
    FRAMES,
    GEOMETRY,
    HYBRID,
    HYBRID_FRAMES,
    NUM_BLOCKS,
)

from vllm_attn_offload.protocol.frames import FrameKind
from vllm_attn_offload.protocol.geometry import SessionGeometry


@st.composite
def streams(draw: st.DrawFn, frames: list[bytes], others: list[bytes]) -> bytes:
    """Frames in their order, and then a few that are broken or out of place."""
    stream = frames[: draw(st.integers(0, len(frames)))]
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(stream)))
        seed = draw(st.sampled_from(frames + others))
        if draw(st.booleans()) and position < len(stream):
            seed = stream.pop(position)
        # Header and the counts in front of a STEP decide how the rest is read.
        stream.insert(position, draw(broken_bytes(seed, front=128)))
    return b"".join(stream)


def converse(
    address: str,
    stream: bytes,
    num_frames: int = 0,
    geometry: SessionGeometry = GEOMETRY,
) -> list[int]:
    """Send a stream on a session of its own; kinds of the frames that came back.

    Args:
        address: The memory node.
        stream: Bytes of frames.
        num_frames: That come back before the channel is half closed, after which a
            layer under way may end.
        geometry: Of the session.
    """
    kinds = []
    with closing(RawSession(address, geometry, NUM_BLOCKS)) as session:
        with suppress(ConnectionError):
            session.send_raw(stream)
        kinds += [session.receive()[0] for _ in range(num_frames)]
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
    expected = 2 * (3 + 1) * 2 * [FrameKind.OUT]
    assert converse(unharmed.address, b"".join(FRAMES), len(expected)) == expected
    expected = 2 * len(HYBRID.layers) * [FrameKind.OUT]
    stream = b"".join(HYBRID_FRAMES)
    assert converse(unharmed.address, stream, len(expected), HYBRID) == expected


@pytest.mark.parametrize("has_groups", [False, True], ids=["one group", "two groups"])
def test_streams(unharmed: NodeProcess, has_groups: bool) -> None:
    geometry, frames = (HYBRID, HYBRID_FRAMES) if has_groups else (GEOMETRY, FRAMES)
    others = [] if has_groups else EDGE_FRAMES

    @ROUND
    @given(streams(frames, others))
    def one_round(stream: bytes) -> None:
        converse(unharmed.address, stream, geometry=geometry)

    fuzz(one_round, share=0.5)
