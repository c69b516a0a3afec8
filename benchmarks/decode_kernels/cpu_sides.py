# SPDX-License-Identifier: Apache-2.0
"""The two CPU attention kernels that ``kernels_cpu.py`` compares, with their caches."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_attn_offload.native.attention import (
    CpuKernelLibrary,
)
from vllm_attn_offload.native.kernel_inputs import (
    DTYPES,
    AttendInput,
    PlanInput,
    StoreInput,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads, head size and dtypes of one benchmarked layer."""

    name: str
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype  # of queries, and of keys and values before they are stored
    cache_dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_size * self.cache_dtype.itemsize

    @property
    def kv_cache_dtype(self) -> str:
        """vLLM's name of the cache's dtype."""
        return "fp8_e4m3" if self.cache_dtype == torch.float8_e4m3fn else "auto"


def huge_buffer(num_bytes: int) -> torch.Tensor:
    """Zeroed memory in huge pages where the kernel has them."""
    # Shared memory, the default of this call, would get small pages.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Batch:
    """Shuffled blocks of one arena, shared out to layers that are used in turn.

    The last ``rows`` tokens of each sequence are query rows.
    """

    def __init__(
        self,
        shape: Shape,
        batch: int,
        context: int,
        rows: int,
        num_blocks: int,
        block_size: int,
    ) -> None:
        per_sequence = -(-context // block_size)
        per_layer = batch * per_sequence
        self.shape, self.batch, self.context = shape, batch, context
        self.rows = rows
        # Lengths differ a little, as in a served batch.
        self.lens = [
            max(rows, context - 3 * i % (context // 4 + 1)) for i in range(batch)
        ]
        self.kv_bytes = sum(self.lens) * shape.token_bytes
        num_layers = min(64, num_blocks // per_layer)
        order = torch.randperm(num_blocks)[: num_layers * per_layer].int()
        self.tables = order.view(num_layers, batch, per_sequence)
        self.seq_lens = torch.tensor(self.lens, dtype=torch.int32)
        self.query_start_loc = rows * torch.arange(batch + 1, dtype=torch.int32)
        size = (rows * batch, shape.num_query_heads, shape.head_size)
        self.query = torch.randn(size).to(shape.dtype)
        self.scale = shape.head_size**-0.5


class Ours:
    """The package's kernel on its own cache."""

    def __init__(
        self,
        library: CpuKernelLibrary,
        shape: Shape,
        num_blocks: int,
        block_size: int,
        isa: str | None,
    ) -> None:
        self.library, self.shape = library, shape
        self.cache = library.create_cache(
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            v_head_size=shape.head_size,
            dtype=_name(shape.cache_dtype),
            isa=isa,
        )
        self.memory = huge_buffer(num_blocks * self.cache.block_bytes)
        self.plan = library.create_plan(self.cache)

    def store(
        self, pool: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        call = StoreInput(cache=self.memory.data_ptr())
        call.key, call.value = key.data_ptr(), value.data_ptr()
        call.key_stride = call.value_stride = key[0].nbytes
        call.source_dtype = DTYPES[_name(key.dtype)]
        call.slot_mapping, call.num_tokens = slots.data_ptr(), len(slots)
        self.library.store(pool, self.cache, call)

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """What the cache holds of keys or values."""
        return x.to(self.shape.cache_dtype)

    def prepare(self, batch: Batch, pool: int) -> Callable[[int], None]:
        """Return a function that attends in one layer."""
        query, width = batch.query, batch.tables.shape[2]
        self.out = torch.empty_like(query)
        self.lse = torch.empty(query.shape[:2])
        attend = AttendInput(cache=self.memory.data_ptr())
        attend.query, attend.out = query.data_ptr(), self.out.data_ptr()
        attend.lse = self.lse.data_ptr()
        attend.query_stride = attend.out_stride = query[0].nbytes
        attend.softmax_scale = batch.scale
        attend.query_dtype = attend.out_dtype = DTYPES[_name(query.dtype)]
        self.plans: list[int] = []
        for table in batch.tables:
            plan = self.library.create_plan(self.cache)
            call = PlanInput(num_seqs=batch.batch, max_blocks=width)
            call.query_start_loc = batch.query_start_loc.data_ptr()
            call.seq_lens, call.block_table = (
                batch.seq_lens.data_ptr(),
                table.data_ptr(),
            )
            call.table_stride, call.num_query_heads = width, query.shape[1]
            self.library.plan_step(pool, plan, call)
            self.plans.append(plan)

        def attend_layer(layer: int) -> None:
            self.library.attend(pool, self.plans[layer], attend)

        return attend_layer

    def forget_plans(self) -> None:
        for plan in self.plans:
            self.library.destroy_plan(plan)


class Vllm:
    """vLLM's ``cpu_attention_with_kv_cache``, called as its CPU backend does."""

    def __init__(self, shape: Shape, num_blocks: int, block_size: int) -> None:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.ops, self.shape = ops, shape
        self.isa = _get_attn_isa(
            shape.dtype, block_size, shape.head_size, shape.kv_cache_dtype
        )
        memory = huge_buffer(num_blocks * block_size * shape.token_bytes)
        # vLLM keeps fp8 as bytes.
        is_fp8 = shape.kv_cache_dtype != "auto"
        cache = memory.view(torch.uint8 if is_fp8 else shape.cache_dtype).view(
            num_blocks, shape.num_kv_heads, 2 * block_size, shape.head_size
        )
        self.k, self.v = cache.chunk(2, dim=2)

    def store(
        self, pool: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        self.ops.cpu_attn_reshape_and_cache(
            key,
            value,
            self.k,
            self.v,
            slots,
            self.isa,
            kv_cache_dtype=self.shape.kv_cache_dtype,
        )

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """What the cache holds of keys or values."""
        nearest = x.to(self.shape.cache_dtype)
        if self.shape.kv_cache_dtype == "auto":
            return nearest
        # vLLM 0.32's CPU kernels cut fp8 off instead of rounding it.
        is_up = nearest.float().abs() > x.float().abs()
        return (nearest.view(torch.uint8) - is_up.byte()).view(nearest.dtype)

    def prepare(self, batch: Batch, pool: int) -> Callable[[int], None]:
        """Return a function that attends in one layer."""
        shape, window = self.shape, -1
        self.out = torch.empty_like(batch.query)
        metadata = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch.batch,
            num_heads=shape.num_query_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_size,
            seq_lens=batch.seq_lens,
            dtype=shape.dtype,
            query_start_loc=batch.query_start_loc,
            causal=True,
            sliding_window_size=window,
            isa=self.isa,
            enable_kv_split=True,
            kv_cache_dtype=shape.kv_cache_dtype,
        )
        return lambda layer: self.ops.cpu_attention_with_kv_cache(
            query=batch.query,
            key_cache=self.k,
            value_cache=self.v,
            output=self.out,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=batch.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=window,
            block_table=batch.tables[layer],
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
            kv_cache_dtype=shape.kv_cache_dtype,
        )


def _name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return "fp8_e4m3" if name == "float8_e4m3fn" else name
