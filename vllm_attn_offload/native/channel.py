# SPDX-License-Identifier: Apache-2.0
"""Channels through shared memory in the C library (``csrc/channel.cpp``)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import (
    Structure,
    c_int32,
    c_int64,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

from vllm_attn_offload.native.library import open_library
from vllm_attn_offload.native.waits import Signal

#: What `NativeChannels.receive` may find in place of a frame, beside codes of waits.
OVERRUN, MALFORMED, TOO_LONG = 5, 6, 7
#: What `NativeChannels.exchange` may find in place of the layer's output.
OTHER_FRAME = 16
_MAX_SLOTS = 64


class RingPlace(Structure):
    """Shared memory of one direction: ``AoRing``."""

    _fields_ = [
        ("headers", c_void_p),
        ("slots", c_void_p),
        ("slot_stride", c_int64),
        ("slot_bytes", c_int64),
    ]


class Frame(Structure):
    """A header, as ``protocol/frames.py`` has it."""

    _fields_ = [
        ("magic", c_uint32),
        ("kind", c_uint16),
        ("layer", c_uint16),
        ("step", c_uint64),
        ("micro_batch", c_uint16),
        ("group", c_uint16),
        ("flags", c_uint32),
        ("num_bytes", c_uint64),
    ]


class Channel(Structure):
    """One side of a channel, private to it: ``AoChannel``.

    ``taken`` is the slot of the next frame, ``current`` that of ``frame``, whose header
    came last; -1 for none. ``outgoing`` is the header of the next one that is sent.
    """

    _fields_ = [
        ("out_ring", RingPlace),
        ("in_ring", RingPlace),
        ("sent", Signal),
        ("freed", Signal),
        ("received", Signal),
        ("released", Signal),
        ("outgoing", Frame),
        ("frame", Frame),
        ("num_sent", c_uint64),
        ("num_freed", c_uint64),
        ("num_received", c_uint64),
        ("num_slots", c_int32),
        ("taken", c_int32),
        ("current", c_int32),
        ("num_free", c_int32),
        ("first_held", c_int32),
        ("num_held", c_int32),
        ("free_slots", c_int32 * _MAX_SLOTS),
        ("held_slots", c_int32 * _MAX_SLOTS),
    ]

    def hold_no_slots(self, num_slots: int) -> None:
        """Begin with all slots free."""
        self.num_slots = self.num_free = num_slots
        self.taken = self.current = -1
        for slot in range(num_slots):
            self.free_slots[slot] = slot


class Exchange(Structure):
    """A layer whose rows all go to one node: ``AoExchange``.

    Rows of q, k and v take ``q_bytes``, ``k_bytes`` and ``v_bytes`` and lie
    ``query_stride``, ``key_stride`` and ``value_stride`` bytes apart; ``key`` is 0
    where the layer stores nothing. ``out`` has ``out_bytes``. ``packed_ns`` and
    ``sent_ns`` are filled.
    """

    _fields_ = [
        ("channel", c_void_p),
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("out", c_void_p),
        ("query_stride", c_int64),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("num_rows", c_int64),
        ("out_bytes", c_int64),
        ("step", c_uint64),
        ("packed_ns", c_int64),
        ("sent_ns", c_int64),
        ("q_bytes", c_int32),
        ("k_bytes", c_int32),
        ("v_bytes", c_int32),
        ("layer", c_int32),
        ("micro_batch", c_int32),
        ("take_ms", c_int32),
        ("answer_ms", c_int32),
        ("deadline_ns", c_int64),
        ("is_sent", c_int32),
    ]


class NativeChannels:
    """The C functions; they take references (``ctypes.byref``) to the structs above.

    ``take(channel, timeout_ms)``, ``receive(channel, timeout_ms)`` and
    ``exchange(call, unused)``, whose timeouts are in the struct, return a code;
    ``send(channel)`` never blocks and so keeps the GIL.
    """

    # Without argtypes: converting arguments to them takes longer than the calls.

    def __init__(self, waits: ctypes.CDLL, posts: ctypes.PyDLL) -> None:
        self.take: Callable[[Any, int], int] = waits.ao_channel_take
        self.receive: Callable[[Any, int], int] = waits.ao_channel_receive
        self.exchange: Callable[[Any, int], int] = waits.ao_exchange
        self.send: Callable[[Any], None] = posts.ao_channel_send


@functools.cache
def load_channels() -> NativeChannels | None:
    """The functions, or None where the package was installed without a compiler.

    Raises:
        RuntimeError: The library was built from other sources than this package's.
    """
    waits, posts = open_library(ctypes.CDLL), open_library(ctypes.PyDLL)
    return None if waits is None or posts is None else NativeChannels(waits, posts)
