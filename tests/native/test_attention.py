# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against a float64 reference, in shuffled, poisoned blocks."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import pytest
import torch

from vllm_attn_offload.native.attention import (
    DTYPES,
    AttendInput,
    CpuKernelLibrary,
    PlanInput,
    StoreInput,
    load_cpu_library,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN_BYTE = 0xFF  # repeated, it is NaN in all three dtypes


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One step of one layer. Each request has (cached and new tokens, query rows)."""

    requests: list[tuple[int, int]]
    heads: tuple[int, int] = (4, 1)
    head_sizes: tuple[int, int] = (64, 64)
    dtype: torch.dtype = FP32
    block_size: int = 16
    isa: str | None = None
    threads: int = 1
    causal: bool = True
    window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False
    has_alibi: bool = False
    # Which node of how many holds a block, by the block's index: None is all here.
    share: tuple[int, int] | None = None
    seed: int = field(default=0)


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
        self.cache = library.create_cache(
            num_blocks=num_blocks,
            block_size=case.block_size,
            num_kv_heads=num_kv_heads,
            head_size=size,
            v_head_size=v_size,
            dtype=name_of(case.dtype),
            isa=case.isa,
        )
        size_bytes = num_blocks * self.cache.block_bytes
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
        self._store()
        self._plan()

    def close(self) -> None:
        self.library.destroy_plan(self.plan)
        self.library.destroy_cache(self.cache)
        self.library.destroy_pool(self.pool)

    def holds(self, request: int, position: torch.Tensor) -> torch.Tensor:
        """Whether this node has the block of each position."""
        if self.case.share is None:
            return torch.ones_like(position, dtype=torch.bool)
        index, count = self.case.share
        return position // self.case.block_size % count == index

    def readable(self, request: int, position: torch.Tensor) -> torch.Tensor:
        """Positions that some row may see: all others stay poisoned."""
        total, rows = self.case.requests[request]
        readable = self.holds(request, position)
        if self.case.window:
            readable &= position > total - rows - self.case.window
        return readable

    def _store(self) -> None:
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
        call = StoreInput(cache=self.memory.data_ptr())
        call.key = fused.data_ptr()
        call.value = fused.data_ptr() + heads * size * fused.itemsize
        call.key_stride = call.value_stride = heads * (size + v_size) * fused.itemsize
        call.slot_mapping, call.num_tokens = mapping.data_ptr(), len(mapping)
        self.library.store(self.pool, self.cache, call)

    def _plan(self) -> None:
        case = self.case
        call = PlanInput(causal=case.causal, num_seqs=len(case.requests))
        call.query_start_loc, call.seq_lens = self.rows.data_ptr(), self.lens.data_ptr()
        call.max_blocks, call.num_query_heads = self.width, case.heads[0]
        table = self.table
        if case.share is not None:
            index, count = case.share
            first = torch.arange(self.width, dtype=torch.int32) * case.block_size
            positions = first.repeat(len(case.requests), 1)[:, index::count]
            lens = (self.lens[:, None] - positions).clamp(0, case.block_size)
            positions, lens = positions.contiguous(), lens.int().contiguous()
            table = self.table[:, index::count].contiguous()
            call.max_blocks = table.shape[1]
            call.block_positions, call.block_lens = (
                positions.data_ptr(),
                lens.data_ptr(),
            )
        call.block_table, call.table_stride = table.data_ptr(), table.shape[1]
        self.library.plan_step(self.pool, self.plan, call)

    def run(self, out_dtype: torch.dtype = FP32) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, heads = self.query.shape[:2]
        out = torch.full((tokens, heads, self.case.head_sizes[1]), torch.nan)
        out = out.to(out_dtype)
        lse = torch.full((tokens, heads), torch.nan)
        call = AttendInput(cache=self.memory.data_ptr())
        call.query, call.query_stride = self.query.data_ptr(), self.query.stride(0)
        call.query_stride *= self.query.itemsize
        call.out, call.out_stride = out.data_ptr(), out.stride(0) * out.itemsize
        call.lse, call.softmax_scale = lse.data_ptr(), self.scale
        call.sinks = 0 if self.sinks is None else self.sinks.data_ptr()
        call.alibi_slopes = 0 if self.alibi is None else self.alibi.data_ptr()
        call.soft_cap, call.sliding_window = self.case.soft_cap, self.case.window
        call.query_dtype = DTYPES[name_of(self.query.dtype)]
        call.out_dtype = DTYPES[name_of(out_dtype)]
        self.library.attend(self.pool, self.plan, call)
        return out, lse

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 output and LSE over what this node holds."""
        outs, lses = [], []
        for request, (total, rows) in enumerate(self.case.requests):
            begin = int(self.rows[request])
            for row in range(rows):
                position = total - rows + row
                query = self.query[begin + row].double()
                out, lse = self._reference_row(request, position, query)
                outs.append(out)
                lses.append(lse)
        return torch.stack(outs), torch.stack(lses)

    def _reference_row(
        self, request: int, position: int, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        group = case.heads[0] // case.heads[1]
        key, value = (
            x[request].double().repeat_interleave(group, dim=1)
            for x in (self.keys, self.values)
        )
        where = torch.arange(key.shape[0])
        scores = torch.einsum("hd,nhd->hn", query, key) * self.scale
        if case.soft_cap:
            scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
        if self.alibi is not None:
            scores = scores + self.alibi.double()[:, None] * (where - position)
        visible = self.holds(request, where)
        if case.causal:
            visible &= where <= position
        if case.window:
            visible &= where > position - case.window
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = torch.logsumexp(scores, dim=1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks.double())
        probabilities = torch.exp(scores - lse[:, None]).nan_to_num(0.0)
        return torch.einsum("hn,nhd->hd", probabilities, value), lse


@pytest.fixture(scope="module")
def library() -> CpuKernelLibrary:
    library = load_cpu_library()
    if library is None:
        pytest.skip("the CPU kernel library is not built: no C++ compiler at install")
    return library


def check(library: CpuKernelLibrary, case: Case) -> None:
    step = Step(library, case)
    out, lse = step.run()
    expected, expected_lse = step.reference()
    step.close()
    # Pair kernels round probabilities to bf16; everything else stays in fp32.
    is_rounded = case.dtype == BF16 and (case.isa or step.cache.isa).endswith(
        ("pairs", "bf16")
    )
    tolerance = 1e-2 if is_rounded else 3e-6
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=0)


RAGGED = [(1, 1), (15, 1), (16, 1), (17, 1), (64, 1), (65, 1), (301, 1)]
FORCED = ("avx512-bf16", "avx512", "avx2", "avx2-pairs", "portable", "portable-pairs")


@pytest.mark.parametrize("isa", FORCED)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_attend_isa(library: CpuKernelLibrary, isa: str, dtype: torch.dtype) -> None:
    if isa not in library.isa_names:
        pytest.skip(f"this CPU does not run {isa}")
    case = Case(RAGGED, heads=(10, 2), head_sizes=(128, 128), dtype=dtype, isa=isa)
    check(library, case)
    # Chunks, odd tiles and rows that start and end within a tile.
    chunks = replace(case, requests=[(70, 37), (19, 3)], heads=(3, 3), window=21)
    check(library, replace(chunks, head_sizes=(72, 40), block_size=24))


CASES = {
    "mha-hs32": Case(RAGGED, (4, 4), (32, 32), BF16),
    "group2": Case(RAGGED, (4, 2), (64, 64), BF16),
    "group3-smollm2": Case(RAGGED, (9, 3), (64, 64), BF16, threads=2),
    "group8-hs256": Case(RAGGED, (8, 1), (256, 256), BF16),
    "hs80-fp16": Case(RAGGED, (4, 2), (80, 80), FP16),
    "latent-576-512": Case([(1, 1), (130, 1)], (40, 1), (576, 512), BF16, 64),
    "block1": Case([(5, 1), (20, 1)], (2, 1), dtype=BF16, block_size=1),
    "block7": Case(RAGGED, (2, 1), dtype=BF16, block_size=7),
    "block128": Case(RAGGED, (2, 1), block_size=128),
    "no-rows-no-tokens": Case([(0, 0), (9, 0), (0, 1), (3, 2)], dtype=BF16),
    "more-rows-than-tokens": Case([(2, 5)]),
    "split-two-threads": Case([(9000, 1)], (3, 1), (128, 128), BF16, 32, threads=2),
    "split-chunk": Case([(3000, 40), (1, 1)], (2, 1), (128, 128), FP32, threads=3),
    "not-causal": Case([(40, 5), (3, 3)], causal=False),
    "window": Case([(300, 1), (100, 20), (5, 1)], dtype=BF16, window=33),
    "soft-cap": Case(RAGGED, dtype=BF16, soft_cap=5.0),
    "sinks": Case([*RAGGED, (0, 1)], dtype=BF16, has_sinks=True),
    "sinks-split": Case([(9000, 1)], (2, 1), (128, 128), threads=2, has_sinks=True),
    "alibi-chunk": Case([(90, 6), (33, 1)], has_alibi=True),
    "subset-first": Case([(100, 4), (7, 1)], dtype=BF16, share=(0, 3)),
    "subset-last": Case([(100, 4), (7, 1)], dtype=BF16, share=(2, 3), window=50),
}


@pytest.mark.parametrize("name", CASES)
def test_attend(library: CpuKernelLibrary, name: str) -> None:
    check(library, CASES[name])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_attend_rounds_output(library: CpuKernelLibrary, dtype: torch.dtype) -> None:
    step = Step(library, Case(RAGGED, dtype=dtype))
    exact, _ = step.run()
    rounded, _ = step.run(dtype)
    step.close()
    assert torch.equal(rounded, exact.to(dtype))


def test_two_sessions_at_once(library: CpuKernelLibrary) -> None:
    """Two threads on one pool get bit for bit what each gets alone."""
    cases = [
        Case([(2500, 1), (40, 1)], (8, 2), (128, 128), BF16, threads=2, seed=seed)
        for seed in (1, 2)
    ]
    steps = [Step(library, case) for case in cases]
    alone = [step.run() for step in steps]
    own_pools = [step.pool for step in steps]
    for step in steps:
        step.pool = own_pools[0]
    wrong: list[int] = []

    def hammer(index: int) -> None:
        for _ in range(200):
            got = steps[index].run()
            if not all(map(torch.equal, got, alone[index])):
                wrong.append(index)

    threads = [threading.Thread(target=hammer, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step, pool in zip(steps, own_pools, strict=True):
        step.pool = pool
        step.close()
    assert not wrong


def test_bad_input_is_refused(library: CpuKernelLibrary) -> None:
    step = Step(library, Case([(40, 1)]))
    step.table[0, 1] = 1000
    with pytest.raises(ValueError, match="block id outside the cache"):
        step._plan()
    step.table[0, 1] = 0
    step.lens[0] = 1000
    with pytest.raises(ValueError, match="lengths that contradict"):
        step._plan()
    slots = torch.tensor([10**6])
    with pytest.raises(ValueError, match="slot outside the cache"):
        library.store(
            step.pool,
            step.cache,
            StoreInput(slot_mapping=slots.data_ptr(), num_tokens=1),
        )
    step.close()
    with pytest.raises(ValueError, match="head sizes 60 and 64"):
        Step(library, Case([(40, 1)], head_sizes=(60, 64)))
    with pytest.raises(ValueError, match="ISA sse9"):
        Step(library, Case([(40, 1)], isa="sse9"))


def test_block_bytes_show_padding(library: CpuKernelLibrary) -> None:
    for block_size, padded in ((16, 16), (32, 32), (24, 32), (1, 16)):
        step = Step(library, Case([(4, 1)], (2, 2), (64, 72), BF16, block_size))
        assert step.cache.block_bytes == padded * 2 * (64 + 80) * 2
        step.close()
