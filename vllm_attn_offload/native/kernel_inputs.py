# SPDX-License-Identifier: Apache-2.0
"""Arguments of the CPU kernels, as the structs of ``csrc/abi.h``."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

#: Codes of ``abi.h``. Only caches hold fp8; all else is in one of the other dtypes.
DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "fp8_e4m3": 3}


class GeometryInput(Structure):
    """Arguments of `CpuKernelLibrary.create_cache`, which fills it."""

    _fields_ = [
        ("num_blocks", c_int64),
        ("block_size", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("v_head_size", c_int32),
        ("dtype", c_int32),
        ("block_stride", c_int64),
    ]


class StoreInput(Structure):
    """Arguments of `CpuKernelLibrary.store`; fill it once and reuse it.

    ``key`` is ``[num_tokens, num_kv_heads, head_size]``, ``value`` ``[num_tokens,
    num_kv_heads, v_head_size]``, both in the cache's dtype with contiguous tokens
    ``key_stride`` and ``value_stride`` bytes apart. ``slot_mapping`` is int64
    ``[num_tokens]``; negative slots are skipped.

    A cache in fp8 takes them in ``source_dtype`` and keeps ``key / k_scale`` and
    ``value / v_scale``, in fp32 held within +-448 and rounded to nearest even.

    A call takes as long as its tokens: 8,192 of 8 heads of 128 take tens of
    milliseconds. Move the three pointers on to store them in ranges.
    """

    _fields_ = [
        ("cache", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("slot_mapping", c_void_p),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("num_tokens", c_int64),
        ("source_dtype", c_int32),
        ("k_scale", c_float),
        ("v_scale", c_float),
    ]

    def __init__(
        self, *, k_scale: float = 1.0, v_scale: float = 1.0, **fields: int | None
    ) -> None:
        super().__init__(k_scale=k_scale, v_scale=v_scale, **fields)


class PlanInput(Structure):
    """Arguments of `CpuKernelLibrary.plan_step`; fill it once and reuse it.

    int32 tensors: ``query_start_loc [num_seqs + 1]``, ``seq_lens [num_seqs]`` (tokens
    that may be read), ``query_positions [num_seqs]`` (position of a request's first
    row; 0: its rows are the last tokens), ``block_table [num_seqs, max_blocks]`` with
    rows ``table_stride`` elements apart. Column ``c`` holds tokens from ``index *
    block_size`` on, where the index is ``first_block[seq] + c``, or that of
    ``block_indices`` (like the table: rising, -1 behind the last); both may be 0.
    ``sliding_window`` counts a row's own key; 0 means all keys up to its own. Columns
    that no row sees may hold anything.
    """

    _fields_ = [
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("query_positions", c_void_p),
        ("block_table", c_void_p),
        ("block_indices", c_void_p),
        ("first_block", c_void_p),
        ("table_stride", c_int64),
        ("num_seqs", c_int32),
        ("max_blocks", c_int32),
        ("num_query_heads", c_int32),
        ("sliding_window", c_int32),
    ]


class AttendInput(Structure):
    """Arguments of `CpuKernelLibrary.attend`; fill it once and reuse it.

    ``query`` is ``[num_tokens, num_query_heads, head_size]`` and ``out`` ``[num_tokens,
    num_query_heads, v_head_size]`` with contiguous tokens ``query_stride`` and
    ``out_stride`` bytes apart. ``lse`` is fp32 ``[num_tokens, num_query_heads]``,
    natural log, or 0. ``sinks`` is fp32 ``[num_query_heads]``, or 0 where another
    partial counts them. ``alibi_slopes`` likewise, times (key - query position).
    ``soft_cap`` is 0 for none. Keys and values are ``k_scale`` and ``v_scale`` times
    what the cache holds.
    """

    _fields_ = [
        ("cache", c_void_p),
        ("query", c_void_p),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("sinks", c_void_p),
        ("alibi_slopes", c_void_p),
        ("query_stride", c_int64),
        ("out_stride", c_int64),
        ("softmax_scale", c_float),
        ("soft_cap", c_float),
        ("query_dtype", c_int32),
        ("out_dtype", c_int32),
        ("k_scale", c_float),
        ("v_scale", c_float),
    ]

    def __init__(
        self,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        **fields: int | float | None,
    ) -> None:
        super().__init__(k_scale=k_scale, v_scale=v_scale, **fields)
