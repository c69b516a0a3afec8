# SPDX-License-Identifier: Apache-2.0
"""Frames, counters and headers that a worker falsifies in the memory it shares."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
from fuzzing import EDGE_INTEGERS, ROUND, broken_bytes, fuzz
from hypothesis import given
from hypothesis import strategies as st
from node_process import NodeProcess
from real_frames import EDGE_FRAMES, FRAMES
from shared_session import CONTROL_BYTES, SharedSession

from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.frames import FrameKind
from vllm_attn_offload.transport.channel_memory import NUM_SIGNALS

pytestmark = pytest.mark.skipif(
    load_waits() is None, reason="the C library is not built"
)
#: Of the time of other fuzz tests, which cover what frames say.
TIME_SHARE = 0.5
NUM_SLOTS = 4


@dataclass(frozen=True)
class Attack:
    """A method of `SharedSession` and its arguments."""

    method: str
    arguments: tuple[Any, ...]


SCRIBBLES = st.binary(min_size=1, max_size=64)
SLOTS = st.integers(0, NUM_SLOTS - 1)
ATTACKS = st.one_of(
    st.builds(
        lambda *arguments: Attack("send", arguments),
        st.sampled_from(FRAMES + EDGE_FRAMES).flatmap(
            lambda frame: broken_bytes(frame, front=128)
        ),
        SLOTS,
        SLOTS | EDGE_INTEGERS,
    ),
    st.builds(
        lambda *arguments: Attack("count", arguments),
        st.integers(0, NUM_SIGNALS - 1),
        EDGE_INTEGERS | st.integers(0, (1 << 64) - 1),
    ),
    st.builds(
        lambda *arguments: Attack("write", arguments),
        SLOTS,
        st.integers(0, 1 << 12),
        SCRIBBLES,
    ),
    st.builds(
        lambda *arguments: Attack("scribble", arguments),
        st.integers(0, CONTROL_BYTES - 1),
        SCRIBBLES,
    ),
)


def attack(address: str, num_right: int, attacks: list[Attack], pause_s: float) -> None:
    with closing(SharedSession(address)) as session:
        for frame in FRAMES[:num_right]:
            session.send_right(frame)
        for each in attacks:
            getattr(session, each.method)(*each.arguments)
            time.sleep(pause_s)


def test_real_frames_are_served(unharmed_local: NodeProcess) -> None:
    """The seeds are what they claim to be on this transport, too."""
    with closing(SharedSession(unharmed_local.address)) as session:
        for frame in FRAMES:
            session.send_right(frame)
        assert session.last_kinds(16) == NUM_SLOTS * [FrameKind.OUT]


def test_attacks(unharmed_local: NodeProcess) -> None:
    @ROUND
    @given(
        st.integers(0, len(FRAMES)),
        st.lists(ATTACKS, min_size=1, max_size=6),
        st.sampled_from([0.0, 0.0005]),
    )
    def one_round(num_right: int, attacks: list[Attack], pause_s: float) -> None:
        attack(unharmed_local.address, num_right, attacks, pause_s)

    fuzz(one_round, TIME_SHARE)
