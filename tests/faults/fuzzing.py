# SPDX-License-Identifier: Apache-2.0
"""How bytes and values are broken, and for how long a fuzz test goes on."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: Seconds of each fuzz test; raise it to search for longer.
FUZZ_S = float(os.environ.get("ATTN_OFFLOAD_FUZZ_S", "25"))

#: A few examples at a time: the rounds go on until the time is over.
ROUND = settings(
    max_examples=100,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

_EDGES = [0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 1 << 15, (1 << 31) - 1, 1 << 31]
#: What the fields of messages and frames are bounded by, and one more and less.
_BOUNDS = [1000, *(1 << bits for bits in (10, 12, 14, 16, 20, 22, 30, 31, 40, 50))]
_EDGES += [bound + more for bound in _BOUNDS for more in (-1, 0, 1)]
EDGE_INTEGERS = st.sampled_from(
    [*_EDGES, *(-edge for edge in _EDGES), 1 << 32, 1 << 40, (1 << 63) - 1, -(1 << 63)]
)

#: Anything that msgpack can carry.
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | EDGE_INTEGERS
    | st.floats()
    | st.text(max_size=200)
    | st.binary(max_size=200),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def fuzz(one_round: Callable[[], None], share: float = 1.0) -> None:
    """Repeat a hypothesis test until the time, or a share of it, is over."""
    ends = time.monotonic() + share * FUZZ_S
    while time.monotonic() < ends:
        one_round()


@st.composite
def broken_bytes(draw: st.DrawFn, seed: bytes, *, front: int) -> bytes:
    """``seed`` with a few bytes or integers changed, mostly near its front.

    Args:
        draw: Given by hypothesis.
        seed: Valid bytes.
        front: How many of them decide how the rest is read.
    """
    data = bytearray(seed)
    for _ in range(draw(st.integers(0, 3))):
        end = max(1, min(len(data), front if draw(st.booleans()) else len(data)))
        position = draw(st.integers(0, end - 1))
        match draw(st.sampled_from(["byte", "int32", "int64", "cut", "grow"])):
            case "byte":
                data[position : position + 1] = draw(st.binary(min_size=1, max_size=1))
            case "int32":
                value = draw(EDGE_INTEGERS) & 0xFFFFFFFF
                position -= position % 4
                data[position : position + 4] = struct.pack("<I", value)
            case "int64":
                value = draw(EDGE_INTEGERS) & 0xFFFFFFFFFFFFFFFF
                position -= position % 8
                data[position : position + 8] = struct.pack("<Q", value)
            case "cut":
                del data[position:]
            case "grow":
                data += draw(st.binary(max_size=64))
        if not data:
            break
    return bytes(data)


@st.composite
def broken_value(draw: st.DrawFn, seed: Any) -> Any:
    """``seed``, decoded msgpack, with one part replaced, dropped or added."""
    if isinstance(seed, dict) and seed and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(seed)))
        return {**seed, key: draw(broken_value(seed[key]))}
    if isinstance(seed, list) and seed and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(seed) - 1))
        part = draw(broken_value(seed[index]))
        return [*seed[:index], part, *seed[index + 1 :]]
    if isinstance(seed, dict) and draw(st.booleans()):
        return {**seed, draw(st.text(max_size=8)): draw(VALUES)}
    return draw(VALUES)
