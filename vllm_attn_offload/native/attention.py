# SPDX-License-Identifier: Apache-2.0
"""Loads the CPU kernels and wraps their C interface (``csrc/abi.h``).

Pointers are plain integers (``tensor.data_ptr()``, ``array.ctypes.data``). Every call
releases the GIL. Nothing here imports torch: a node that attends with this library
starts, and is back after a loss, without the seconds that torch takes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path

from vllm_attn_offload.native.library import check_version, find_library

#: Codes of ``abi.h``.
DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}

_OK, _UNFINISHED = 0, 1
_ADVICE = {
    -1: "Lower the batch size or the context length, or add memory.",
    -2: "Use head sizes that are multiples of 8 up to 576, and at least one block, one "
    "token a block and one KV head.",
    -3: "Block ids must lie in 0 .. num_blocks - 1. Check the block table.",
    -4: "query_start_loc must not decrease, seq_lens must fit the block table, and a "
    "block's length must lie in 0 .. block_size. Check the step's tensors.",
    -5: "Slots must be below num_blocks * block_size, or -1 to skip a token. Check the "
    "slot mapping.",
    -6: "Use a multiple of the number of KV heads.",
    -7: "Use bfloat16, float16 or float32.",
    -8: "Use one of CpuKernelLibrary.isa_names.",
}


class _GeometryInput(Structure):
    _fields_ = [
        ("num_blocks", c_int64),
        ("block_size", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("v_head_size", c_int32),
        ("dtype", c_int32),
    ]


class StoreInput(Structure):
    """Arguments of `CpuKernelLibrary.store`; fill it once and reuse it.

    ``key`` is ``[num_tokens, num_kv_heads, head_size]``, ``value`` ``[num_tokens,
    num_kv_heads, v_head_size]``, both in the cache's dtype with contiguous tokens
    ``key_stride`` and ``value_stride`` bytes apart. ``slot_mapping`` is int64
    ``[num_tokens]``; negative slots are skipped.
    """

    _fields_ = [
        ("cache", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("slot_mapping", c_void_p),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("num_tokens", c_int64),
    ]


class PlanInput(Structure):
    """Arguments of `CpuKernelLibrary.plan_step`; fill it once and reuse it.

    int32 tensors: ``query_start_loc [num_seqs + 1]``, ``seq_lens [num_seqs]`` (tokens
    of the whole request, this step's included), ``block_table [num_seqs, max_blocks]``
    with rows ``table_stride`` elements apart. ``block_positions`` (logical position of
    each block's first token) and ``block_lens`` (its valid tokens, 0 for no block) have
    the table's shape and stride, or are 0 where the table holds every block in order.
    ``sliding_window`` only balances the work; 0 means none.
    """

    _fields_ = [
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("block_positions", c_void_p),
        ("block_lens", c_void_p),
        ("table_stride", c_int64),
        ("num_seqs", c_int32),
        ("max_blocks", c_int32),
        ("num_query_heads", c_int32),
        ("causal", c_int32),
        ("sliding_window", c_int32),
    ]


class AttendInput(Structure):
    """Arguments of `CpuKernelLibrary.attend`; fill it once and reuse it.

    ``query`` is ``[num_tokens, num_query_heads, head_size]`` and ``out`` ``[num_tokens,
    num_query_heads, v_head_size]`` with contiguous tokens ``query_stride`` and
    ``out_stride`` bytes apart. ``lse`` is fp32 ``[num_tokens, num_query_heads]``,
    natural log, or 0. ``sinks`` is fp32 ``[num_query_heads]``, or 0 where another
    partial counts them. ``alibi_slopes`` likewise, times (key - query position).
    ``soft_cap`` is 0 for none; ``sliding_window`` counts the row's own key, 0 for all.
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
        ("sliding_window", c_int32),
        ("query_dtype", c_int32),
        ("out_dtype", c_int32),
    ]


@dataclass(frozen=True, slots=True)
class CpuCache:
    """A cache geometry and the kernels chosen for it.

    ``block_bytes`` is what one block of one layer, keys and values, takes in the
    private layout; block sizes that are no multiple of 16 tokens, and V head sizes that
    are no multiple of 16, are padded.
    """

    handle: int
    isa: str
    block_bytes: int


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "ao_error_text": (c_char_p, [c_int32]),
    "ao_isa_names": (c_char_p, []),
    "ao_pool_create": (c_void_p, [c_int32, c_void_p, c_int64]),
    "ao_pool_destroy": (None, [c_void_p]),
    "ao_cache_create": (c_int32, [POINTER(_GeometryInput), c_char_p, c_void_p]),
    "ao_cache_destroy": (None, [c_void_p]),
    "ao_cache_isa": (c_char_p, [c_void_p]),
    "ao_block_bytes": (c_int64, [c_void_p]),
    "ao_store": (c_int32, [c_void_p, c_void_p, POINTER(StoreInput)]),
    "ao_plan_create": (c_void_p, [c_void_p]),
    "ao_plan_destroy": (None, [c_void_p]),
    "ao_plan_step": (c_int32, [c_void_p, c_void_p, POINTER(PlanInput)]),
    "ao_attend": (c_int32, [c_void_p, c_void_p, POINTER(AttendInput), c_int64]),
    "ao_read_seconds": (c_double, [c_void_p, c_void_p, c_int64]),
}


class CpuKernelLibrary:
    """The C library's functions, typed. `load_cpu_library` returns the process's one.

    Pools, caches and plans are C objects behind integer handles; destroy each once, a
    plan before its cache. All functions may be called from any thread: jobs on one pool
    run one after another, and a plan or a cache location is used by one call at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        check_version(self._c, path)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype = result
            function.argtypes = arguments

    @property
    def isa_names(self) -> list[str]:
        """Instruction sets that run here, best first; emulations for tests are last."""
        return self._c.ao_isa_names().decode().split()

    def create_pool(
        self, num_threads: int, cpu_ids: Sequence[int] | None = None, spin_us: int = 50
    ) -> int:
        """Start ``num_threads - 1`` worker threads; callers are the remaining one.

        Args:
            num_threads: Threads that work on a job.
            cpu_ids: One CPU per thread. Workers are pinned to all but the first, which
                is for the caller. None pins nothing.
            spin_us: How long a worker spins for the next job while jobs follow each
                other that closely. Use 0 where cores are oversubscribed.

        Raises:
            ValueError: A count or a CPU list that does not fit.
        """
        if num_threads < 1 or (cpu_ids is not None and len(cpu_ids) != num_threads):
            raise ValueError(
                f"num_threads={num_threads} with cpu_ids={cpu_ids}. At least one "
                "thread and exactly one CPU per thread are allowed. Give both the same "
                "length."
            )
        ids = None if cpu_ids is None else (c_int32 * num_threads)(*cpu_ids)
        return self._c.ao_pool_create(num_threads, ids, spin_us * 1000)

    def destroy_pool(self, pool: int) -> None:
        self._c.ao_pool_destroy(pool)

    def create_cache(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        v_head_size: int,
        dtype: str,
        isa: str | None = None,
    ) -> CpuCache:
        """Describe a cache; the caller allocates its memory, 64-byte aligned.

        Args:
            dtype: A key of `DTYPES`.
            isa: One of `isa_names`; None for the best.

        Raises:
            ValueError: A geometry, dtype or ISA that is not supported.
        """
        geometry = _GeometryInput(
            num_blocks,
            block_size,
            num_kv_heads,
            head_size,
            v_head_size,
            DTYPES.get(dtype, -1),
        )
        handle = c_void_p()
        name = None if isa is None else isa.encode()
        status = self._c.ao_cache_create(byref(geometry), name, byref(handle))
        if status != _OK:
            what = f"{num_blocks} blocks of {block_size}, {num_kv_heads} KV heads, "
            what += f"head sizes {head_size} and {v_head_size}, {dtype}, ISA {isa}"
            self._raise(status, what)
        assert handle.value is not None
        return CpuCache(
            handle.value,
            self._c.ao_cache_isa(handle).decode(),
            self._c.ao_block_bytes(handle),
        )

    def destroy_cache(self, cache: CpuCache) -> None:
        self._c.ao_cache_destroy(cache.handle)

    def create_plan(self, cache: CpuCache) -> int:
        return self._c.ao_plan_create(cache.handle)

    def destroy_plan(self, plan: int) -> None:
        self._c.ao_plan_destroy(plan)

    def store(self, pool: int, cache: CpuCache, call: StoreInput) -> None:
        """Store new keys and values; a bad slot raises ValueError, nothing written."""
        status = self._c.ao_store(pool, cache.handle, call)
        if status != _OK:
            self._raise(status, "store")

    def plan_step(self, pool: int, plan: int, call: PlanInput) -> None:
        """Plan one step for all layers. Raises ValueError, leaving the plan empty."""
        status = self._c.ao_plan_step(plan, pool, call)
        if status != _OK:
            self._raise(status, "plan_step")

    def attend(
        self, pool: int, plan: int, call: AttendInput, budget_us: int = 0
    ) -> bool:
        """Run the planned attention of one layer, or a slice of it.

        Rows without a visible key get 0 and an LSE of -inf, rows that see a NaN get NaN
        in both. The result does not depend on the slices. `plan_step` and `destroy_plan` abandon an unfinished layer.

        Args:
            call: The same, with the same contents, for every slice of a layer.
            budget_us: Stop soon after this; each call makes progress. 0 for no limit.

        Returns:
            True once the layer is finished; False where the next call goes on.

        Raises:
            ValueError: A dtype that is not supported.
        """
        status = self._c.ao_attend(pool, plan, call, budget_us * 1000)
        if status not in (_OK, _UNFINISHED):
            self._raise(status, "attend")
        return status == _OK

    def read_seconds(self, pool: int, address: int, num_bytes: int) -> float:
        """Seconds that all threads of the pool take to read the memory once."""
        return self._c.ao_read_seconds(pool, address, num_bytes)

    def _raise(self, status: int, what: str) -> None:
        text = self._c.ao_error_text(status).decode()
        error = MemoryError if status == -1 else ValueError
        raise error(f"{what}: {text}. {_ADVICE[status]}")


@functools.cache
def load_cpu_library() -> CpuKernelLibrary | None:
    """The built library, or None where the package was installed without a compiler.

    Raises:
        RuntimeError: The library was built from other sources than this package's.
    """
    path = find_library()
    return None if path is None else CpuKernelLibrary(path)
