# SPDX-License-Identifier: Apache-2.0
"""Waiting in the C library (``csrc/wait.cpp``), without the GIL."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import (
    Structure,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from typing import Any

from vllm_attn_offload.native.library import open_library

READY, TIMED_OUT, CLOSED, INTERRUPTED, FAILED = range(5)
_MAX_MILLISECONDS = (1 << 31) - 1


class Signal(Structure):
    """A counter in shared memory: one side posts it, the other waits for it.

    ``counter`` (uint64) and ``is_waiting`` (uint32) are addresses in shared memory,
    ``doorbell`` is the eventfd that wakes the waiter, ``socket`` shows that the peer is
    gone. A wait is for ``target``; ``seen`` is the counter when it was last read.
    """

    _fields_ = [
        ("counter", c_void_p),
        ("is_waiting", c_void_p),
        ("doorbell", c_int32),
        ("socket", c_int32),
        ("spin_ns", c_int64),
        ("last_wait_ns", c_int64),
        ("target", c_uint64),
        ("seen", c_uint64),
        ("posted", c_uint64),
    ]


class Receive(Structure):
    """A buffer to be filled from a socket, and how far an unfinished call is.

    ``error`` is ETIMEDOUT where bytes came until the deadline of the whole buffer.
    """

    _fields_ = [
        ("data", c_void_p),
        ("num_bytes", c_int64),
        ("received", c_int64),
        ("spin_ns", c_int64),
        ("last_wait_ns", c_int64),
        ("socket", c_int32),
        ("stall_ms", c_int32),
        ("error", c_int32),
        ("deadline_ns", c_int64),
    ]


class NativeWaits:
    """The C functions; they take references (``ctypes.byref``) to the structs above.

    ``wait(signal, timeout_ms)`` and ``receive(call, timeout_ms)`` return one of the
    codes above; a negative timeout waits for ever. ``post(signal)`` raises the counter
    by one. It never blocks and so keeps the GIL: giving it up costs more than the call.
    """

    # Without argtypes: converting arguments to them takes longer than the calls.

    def __init__(self, waits: ctypes.CDLL, posts: ctypes.PyDLL) -> None:
        self.wait: Callable[[Any, int], int] = waits.ao_signal_wait
        self.receive: Callable[[Any, int], int] = waits.ao_receive
        self.post: Callable[[Any], int] = posts.ao_signal_post


def milliseconds(timeout_s: float | None) -> int:
    """A timeout as the C functions take it."""
    return -1 if timeout_s is None else min(int(timeout_s * 1000), _MAX_MILLISECONDS)


@functools.cache
def load_waits() -> NativeWaits | None:
    """The functions, or None where the package was installed without a compiler.

    Raises:
        RuntimeError: The library was built from other sources than this package's.
    """
    waits, posts = open_library(ctypes.CDLL), open_library(ctypes.PyDLL)
    return None if waits is None or posts is None else NativeWaits(waits, posts)
