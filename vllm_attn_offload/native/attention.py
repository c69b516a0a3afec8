# SPDX-License-Identifier: Apache-2.0
"""Loads the CPU kernels and wraps their C interface (``csrc/abi.h``).

Pointers are plain integers (``tensor.data_ptr()``, ``array.ctypes.data``). Every call
releases the GIL. Nothing here imports torch: a node that attends with this library
starts, and is back after a loss, without the seconds that torch takes.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from vllm_attn_offload.native.kernel_inputs import (
    DTYPES,
    AttendInput,
    GeometryInput,
    PlanInput,
    StoreInput,
)
from vllm_attn_offload.native.library import check_version, find_library

_OK, _UNFINISHED = 0, 1
_ADVICE = {
    -1: "Lower the batch size or the context length, or add memory.",
    -2: "Use head sizes that are multiples of 8 up to 576, at least one block, one "
    "token a block and one KV head, and blocks that do not overlap.",
    -3: "Block ids must lie in 0 .. num_blocks - 1. Check the block table.",
    -4: "query_start_loc must not decrease, positions must lie in 0 .. 2^30, and the "
    "block table must hold, in order, what rows see. Check the step's tensors.",
    -5: "Slots must be below num_blocks * block_size, or -1 to skip a token. Check the "
    "slot mapping.",
    -6: "Use a multiple of the number of KV heads.",
    -7: "Use bfloat16, float16 or float32; fp8 is for caches only.",
    -8: "Use one of CpuKernelLibrary.isa_names.",
}


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
    "ao_cache_create": (c_int32, [POINTER(GeometryInput), c_char_p, c_void_p]),
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
            OSError: The host starts no more threads.
        """
        if num_threads < 1 or (cpu_ids is not None and len(cpu_ids) != num_threads):
            raise ValueError(
                f"num_threads={num_threads} with cpu_ids={cpu_ids}. At least one "
                "thread and exactly one CPU per thread are allowed. Give both the same "
                "length."
            )
        ids = None if cpu_ids is None else (c_int32 * num_threads)(*cpu_ids)
        pool: int | None = self._c.ao_pool_create(num_threads, ids, spin_us * 1000)
        if not pool:
            raise OSError(
                errno.EAGAIN,
                f"{num_threads} threads were asked for, and this host starts no more. "
                "Allowed: what its limits leave (ulimit -u, pids.max). Raise them, or "
                "give the node fewer CPUs (--cpus).",
            )
        return pool

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
        block_stride: int = 0,
        isa: str | None = None,
    ) -> CpuCache:
        """Describe a cache; the caller allocates its memory, 64-byte aligned.

        Args:
            dtype: A key of `DTYPES`.
            block_stride: Bytes from block to block, a multiple of 64; 0 for no gap.
            isa: One of `isa_names`; None for the best.

        Raises:
            ValueError: A geometry, dtype or ISA that is not supported.
        """
        sizes = (num_blocks, block_size, num_kv_heads, head_size, v_head_size)
        geometry = GeometryInput(*sizes, DTYPES.get(dtype, -1), block_stride)
        handle = c_void_p()
        name = None if isa is None else isa.encode()
        status = self._c.ao_cache_create(byref(geometry), name, byref(handle))
        if status != _OK:
            what = f"{num_blocks} blocks of {block_size}, {num_kv_heads} KV heads, "
            what += f"head sizes {head_size} and {v_head_size}, {dtype}, ISA {isa}, "
            what += f"{block_stride} bytes apart"
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
        """Store keys and values of new tokens, in the shapes of `StoreInput`.

        Raises:
            ValueError: A slot is outside the cache, or an fp8 cache gets a dtype that
                is not supported; nothing was written.
        """
        status = self._c.ao_store(pool, cache.handle, call)
        if status != _OK:
            self._raise(status, "store")

    def plan_step(self, pool: int, plan: int, call: PlanInput) -> None:
        """Plan one step of int32 lengths and tables (`PlanInput`) for all layers.

        Raises:
            ValueError: Lengths or blocks that contradict each other or the cache; the
                plan is empty.
            MemoryError: No memory for the plan; it is empty.
        """
        status = self._c.ao_plan_step(plan, pool, call)
        if status != _OK:
            self._raise(status, "plan_step")

    def attend(
        self, pool: int, plan: int, call: AttendInput, budget_us: int = 0
    ) -> bool:
        """Run the planned attention of one layer, or a slice of it.

        Query ``[num_tokens, num_query_heads, head_size]`` to output ``[num_tokens,
        num_query_heads, v_head_size]`` and LSE, as `AttendInput` says. Rows without a
        visible key get 0 and an LSE of -inf, rows that see a NaN get NaN in both, but
        one stored as fp8 may read as 480 times the scale (csrc/README.md). The result
        does not depend on the slices. `plan_step` and `destroy_plan` abandon an
        unfinished layer.

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
