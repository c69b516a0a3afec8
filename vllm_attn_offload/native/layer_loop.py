# SPDX-License-Identifier: Apache-2.0
"""Layers served in the C library (``csrc/serve.cpp``), and what it is told of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import (
    Structure,
    c_float,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from typing import Any

from vllm_attn_offload.native.library import open_library

#: What the loop may return beside the codes of channels; the caller then has the turn.
PASS_ON, UNFINISHED, REFUSED = 16, 17, 18


class ServedLayer(Structure):
    """A layer of a session: ``AoServedLayer``.

    ``cache`` is the handle of a `CpuCache`, ``blocks`` and ``alibi_slopes`` (0: none)
    are addresses, ``kind`` is the index of its plan in a step of its ``group``. The
    sizes are those of a row's q, k, v, output and log-sum-exp.
    """

    _fields_ = [
        ("cache", c_void_p),
        ("blocks", c_void_p),
        ("alibi_slopes", c_void_p),
        ("group", c_int32),
        ("kind", c_int32),
        ("stores", c_int32),
        ("dtype", c_int32),
        ("q_bytes", c_int32),
        ("k_bytes", c_int32),
        ("v_bytes", c_int32),
        ("out_bytes", c_int32),
        ("lse_bytes", c_int32),
        ("softmax_scale", c_float),
        ("soft_cap", c_float),
        ("k_scale", c_float),
        ("v_scale", c_float),
    ]


class ServedStep(Structure):
    """A planned step: ``AoServedStep``. Without ``plans`` there is none."""

    _fields_ = [
        ("number", c_uint64),
        ("num_tokens", c_int64),
        ("num_query_rows", c_int64),
        ("num_attended_tokens", c_int64),
        ("slots", c_void_p),
        ("plans", c_void_p),
        ("pool", c_void_p),
    ]


class ServeCounters(Structure):
    """Sums over layers that were served: ``AoServeCounters``."""

    _fields_ = [
        ("num_layer_calls", c_int64),
        ("num_attended_tokens", c_int64),
        ("bytes_received", c_int64),
        ("bytes_sent", c_int64),
        ("store_ns", c_int64),
        ("attend_ns", c_int64),
        ("send_ns", c_int64),
        ("layer_ns", c_int64),
    ]


class LayerServer(Structure):
    """A session: ``AoLayerServer``.

    ``steps`` has one for each micro-batch and group, groups innermost. ``turn`` is the
    address of a `TurnWord`. ``is_open`` is changed by who has the turn.
    """

    _fields_ = [
        ("channel", c_void_p),
        ("turn", c_void_p),
        ("layers", c_void_p),
        ("steps", c_void_p),
        ("num_layers", c_int32),
        ("num_groups", c_int32),
        ("num_micro_batches", c_int32),
        ("is_open", c_int32),
        ("max_payload_bytes", c_int64),
        ("slice_ns", c_int64),
        ("reply_bytes", c_int64),
        ("counters", ServeCounters),
    ]


def load_layer_loop() -> Callable[[Any, int], int]:
    """The C function: ``ao_serve_layers(server, timeout_ms)``.

    Raises:
        RuntimeError: There is no library, or it was built from other sources.
    """
    library = open_library(ctypes.CDLL)
    if library is None:
        raise RuntimeError(
            "The C library was not built. Install the package where there is a C++ "
            "compiler."
        )
    serve: Callable[[Any, int], int] = library.ao_serve_layers
    return serve
