# SPDX-License-Identifier: Apache-2.0
"""One step of the CPU kernels in shuffled, poisoned blocks, and its float64 result."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_attn_offload.native.attention import (
    CpuCache,
    CpuKernelLibrary,
)
from vllm_attn_offload.native.kernel_inputs import (
    DTYPES,
    AttendInput,
    PlanInput,
    StoreInput,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
NAN_BYTE = 0xFF  # repeated, it is NaN in all dtypes


def name_of(dtype: torch.dtype) -> str:
    return "fp8_e4m3" if dtype == FP8 else str(dtype).removeprefix("torch.")


def quantized(x: torch.Tensor, scale: float) -> torch.Tensor:
    """What an fp8 cache holds of ``x``, as vLLM rounds it."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


@dataclass(frozen=True)
class Case:
    """One step of one layer. Each request has (cached and new tokens, query rows)."""

    requests: list[tuple[int, int]]
    heads: tuple[int, int] = (4, 1)
    head_sizes: tuple[int, int] = (64, 64)
    dtype: torch.dtype = FP32  # of queries, keys and values
    block_size: int = 16
    isa: str | None = None
    threads: int = 1
    # Of the first row; None: a request's rows are its last tokens.
    positions: tuple[int, ...] | None = None
    # Blocks before the first that a row sees are not in the table.
    is_trimmed: bool = False
    window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False
    has_alibi: bool = False
    gap_bytes: int = 0  # behind each block
    # Which node of how many holds a block, by the block's index: None is all here.
    share: tuple[int, int] | None = None
    seed: int = field(default=0)
    cache_dtype: torch.dtype | None = None  # None: the same
    scales: tuple[float, float] = (1.0, 1.0)  # of keys and values, if the cache is fp8


class Step:
    """A case's tensors, stored in a cache; `run` attends."""

    def __init__(self, library: CpuKernelLibrary, case: Case) -> None:
        torch.manual_seed(case.seed)
        self.library, self.case = library, case
        num_heads, num_kv_heads = case.heads
        size, v_size = case.head_sizes
        lens = [total for total, _ in case.requests]
        rows = [count for _, count in case.requests]
        self.scale = size**-0.5
        self.width = max(1, *(-(-n // case.block_size) for n in lens))
        num_blocks = len(lens) * self.width + 3
        self.cache = self._create_cache(num_blocks, 0)
        stride = self.cache.block_bytes + case.gap_bytes
        if case.gap_bytes:
            library.destroy_cache(self.cache)
            self.cache = self._create_cache(num_blocks, stride)
        size_bytes = num_blocks * stride
        self.memory = torch.full((size_bytes,), NAN_BYTE).byte()
        order = torch.randperm(num_blocks)[: len(lens) * self.width]
        self.table = order.int().view(len(lens), self.width)
        self.pool = library.create_pool(case.threads)
        self.plan = library.create_plan(self.cache)
        self.keys = [torch.randn(n, num_kv_heads, size).to(case.dtype) for n in lens]
        self.values = [
            torch.randn(n, num_kv_heads, v_size).to(case.dtype) for n in lens
        ]
        self.query = torch.randn(sum(rows), num_heads, size).to(case.dtype)
        self.sinks = torch.randn(num_heads) if case.has_sinks else None
        self.alibi = torch.rand(num_heads) if case.has_alibi else None
        self.rows = torch.tensor([0, *rows]).cumsum(0).int()
        self.lens = torch.tensor(lens).int()
        self.store()
        self.plan_step()

    def _create_cache(self, num_blocks: int, block_stride: int) -> CpuCache:
        case = self.case
        return self.library.create_cache(
            num_blocks=num_blocks,
            block_size=case.block_size,
            num_kv_heads=case.heads[1],
            head_size=case.head_sizes[0],
            v_head_size=case.head_sizes[1],
            dtype=name_of(case.cache_dtype or case.dtype),
            block_stride=block_stride,
            isa=case.isa,
        )

    def close(self) -> None:
        self.library.destroy_plan(self.plan)
        self.library.destroy_cache(self.cache)
        self.library.destroy_pool(self.pool)

    def position(self, request: int) -> int:
        """Position of the request's first row."""
        if self.case.positions is not None:
            return self.case.positions[request]
        total, rows = self.case.requests[request]
        return total - rows

    def holds(self, request: int, position: torch.Tensor) -> torch.Tensor:
        """Whether this node has the block of each position."""
        if self.case.share is None:
            return torch.ones_like(position, dtype=torch.bool)
        index, count = self.case.share
        return position // self.case.block_size % count == index

    def readable(self, request: int, position: torch.Tensor) -> torch.Tensor:
        """Positions that some row may see: all others stay poisoned."""
        first, rows = self.position(request), self.case.requests[request][1]
        readable = self.holds(request, position) & (position < first + rows)
        if self.case.window:
            readable &= position > first - self.case.window
        return readable

    def store(self) -> None:
        # Keys and values as views into one row, as a fused projection leaves them.
        size, v_size = self.case.head_sizes
        heads = self.case.heads[1]
        fused = torch.cat(
            [
                torch.cat([k.flatten(1) for k in self.keys]),
                torch.cat([v.flatten(1) for v in self.values]),
            ],
            dim=1,
        )
        slots = []
        for request, (total, _) in enumerate(self.case.requests):
            position = torch.arange(total)
            block = self.table[request].long()[position // self.case.block_size]
            slot = block * self.case.block_size + position % self.case.block_size
            slots.append(torch.where(self.readable(request, position), slot, -1))
        mapping = torch.cat(slots)
        k_scale, v_scale = self.case.scales
        call = StoreInput(
            cache=self.memory.data_ptr(),
            source_dtype=DTYPES[name_of(self.case.dtype)],
            k_scale=k_scale,
            v_scale=v_scale,
        )
        call.key = fused.data_ptr()
        call.value = fused.data_ptr() + heads * size * fused.itemsize
        call.key_stride = call.value_stride = heads * (size + v_size) * fused.itemsize
        call.slot_mapping, call.num_tokens = mapping.data_ptr(), len(mapping)
        self.library.store(self.pool, self.cache, call)

    def plan_step(self) -> None:
        case = self.case
        call = PlanInput(num_seqs=len(case.requests), sliding_window=case.window)
        call.query_start_loc, call.seq_lens = self.rows.data_ptr(), self.lens.data_ptr()
        call.max_blocks, call.num_query_heads = self.width, case.heads[0]
        starts = [self.position(r) for r in range(len(case.requests))]
        positions = torch.tensor(starts).int()
        if case.positions is not None:
            call.query_positions = positions.data_ptr()
        first = torch.zeros_like(positions)
        if case.is_trimmed:
            first = (positions - case.window + 1).clamp(0).int() // case.block_size
            call.first_block = first.data_ptr()
        table = _shifted(self.table, first)
        indices = torch.arange(self.width).int() + first[:, None]
        held = indices * case.block_size < self.lens[:, None]
        if case.share is not None:
            index, count = case.share
            held &= indices % count == index
            # Held columns first, in their order.
            order = held.logical_not().int().argsort(dim=1, stable=True)
            table, indices = table.gather(1, order), indices.gather(1, order)
            indices = torch.where(held.gather(1, order), indices, -1).int()
            call.block_indices = indices.data_ptr()
        call.block_table, call.table_stride = table.data_ptr(), table.shape[1]
        self.library.plan_step(self.pool, self.plan, call)

    def attend_input(self, out: torch.Tensor, lse: torch.Tensor) -> AttendInput:
        """Arguments of the layer; all tensors must outlive their use."""
        call = AttendInput(cache=self.memory.data_ptr())
        call.query, call.query_stride = self.query.data_ptr(), self.query.stride(0)
        call.query_stride *= self.query.itemsize
        call.out, call.out_stride = out.data_ptr(), out.stride(0) * out.itemsize
        call.lse, call.softmax_scale = lse.data_ptr(), self.scale
        call.sinks = 0 if self.sinks is None else self.sinks.data_ptr()
        call.alibi_slopes = 0 if self.alibi is None else self.alibi.data_ptr()
        call.soft_cap = self.case.soft_cap
        call.k_scale, call.v_scale = self.case.scales
        call.query_dtype = DTYPES[name_of(self.query.dtype)]
        call.out_dtype = DTYPES[name_of(out.dtype)]
        return call

    def run(
        self, out_dtype: torch.dtype = FP32, budget_us: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``out [num_tokens, num_heads, v_head_size]``, ``lse [num_tokens, num_heads]``
        in fp32. Counts its calls in ``num_slices``."""
        tokens, heads = self.query.shape[:2]
        out = torch.full((tokens, heads, self.case.head_sizes[1]), torch.nan)
        out = out.to(out_dtype)
        lse = torch.full((tokens, heads), torch.nan)
        call = self.attend_input(out, lse)
        self.num_slices = 1
        while not self.library.attend(self.pool, self.plan, call, budget_us):
            self.num_slices += 1
        return out, lse

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 output and LSE over what this node holds."""
        outs, lses = [], []
        for request, (_, rows) in enumerate(self.case.requests):
            begin = int(self.rows[request])
            for row in range(rows):
                position = self.position(request) + row
                query = self.query[begin + row].double()
                out, lse = self._reference_row(request, position, query)
                outs.append(out)
                lses.append(lse)
        return torch.stack(outs), torch.stack(lses)

    def _cached(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        if self.case.cache_dtype != FP8:
            return x.double()
        # The kernel gets the scale in fp32.
        return quantized(x, scale).double() * torch.tensor(scale).double()

    def _reference_row(
        self, request: int, position: int, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        group = case.heads[0] // case.heads[1]
        key, value = (
            self._cached(x[request], scale).repeat_interleave(group, dim=1)
            for x, scale in zip((self.keys, self.values), case.scales, strict=True)
        )
        where = torch.arange(key.shape[0])
        scores = torch.einsum("hd,nhd->hn", query, key) * self.scale
        if case.soft_cap:
            scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
        if self.alibi is not None:
            scores = scores + self.alibi.double()[:, None] * (where - position)
        visible = self.holds(request, where) & (where <= position)
        if case.window:
            visible &= where > position - case.window
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = torch.logsumexp(scores, dim=1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks.double())
        probabilities = torch.exp(scores - lse[:, None]).nan_to_num(0.0)
        return torch.einsum("hn,nhd->hd", probabilities, value), lse


def _shifted(table: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Rows from their first column on; behind their last one any id."""
    columns = torch.arange(table.shape[1]) + first[:, None]
    behind = columns >= table.shape[1]
    shifted = table.gather(1, columns.clamp(max=table.shape[1] - 1))
    return torch.where(behind, -12345, shifted).int()
