# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against a float64 reference, in shuffled, poisoned blocks."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from cpu_step import BF16, FP16, FP32, Case, Step

from vllm_attn_offload.native.attention import (
    CpuKernelLibrary,
)
from vllm_attn_offload.native.kernel_inputs import (
    StoreInput,
)


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
    "not-causal": Case([(40, 5), (3, 3)], positions=(40, 3)),
    "positions": Case([(90, 4), (33, 1), (20, 3), (0, 2)], positions=(90, 7, 0, 5)),
    "positions-window": Case([(90, 40), (33, 2)], positions=(70, 40), window=20),
    "window-behind-the-tokens": Case([(40, 3), (16, 1)], positions=(60, 90), window=9),
    "window-trimmed": Case(
        [(300, 1), (100, 20), (5, 1)], dtype=BF16, window=33, is_trimmed=True
    ),
    "window-trimmed-block1": Case(
        [(70, 3), (9, 1)], (2, 1), block_size=1, window=4, is_trimmed=True
    ),
    "window-split": Case([(9000, 1)], (3, 1), (128, 128), window=4100, threads=2),
    "cap-alibi-window-hs512": Case(
        [(130, 40), (9, 1)],
        (8, 2),
        (512, 512),
        BF16,
        32,
        positions=(95, 8),
        window=50,
        soft_cap=4.0,
        has_alibi=True,
    ),
    "subset-window-positions": Case(
        [(300, 40), (64, 2)], positions=(280, 64), window=90, share=(1, 3)
    ),
    "subset-trimmed": Case([(300, 3)], window=90, share=(1, 2), is_trimmed=True),
    "gap": Case([(100, 4), (7, 1)], (4, 2), dtype=BF16, gap_bytes=64),
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


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("positions", [None, (3001, 9000, 5)])
def test_whole_tables_are_cut_as_if_counted(
    library: CpuKernelLibrary, positions: tuple[int, ...] | None, window: int
) -> None:
    """Blocks in order, with indices or trimmed: the same cuts, so the same bits."""
    case = Case([(3001, 70), (9000, 1), (5, 1)], (4, 2), threads=3, window=window)
    case = replace(case, positions=positions)
    changes = (
        [{}, {"share": (0, 1)}, {"is_trimmed": True}]
        if window
        else [{}, {"share": (0, 1)}]
    )
    results = []
    for change in changes:
        step = Step(library, replace(case, **change))
        results.append(step.run())
        step.close()
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


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
        step.plan_step()
    step.table[0, 1] = 0
    step.lens[0] = 1000
    with pytest.raises(ValueError, match="lengths that contradict"):
        step.plan_step()
    with pytest.raises(ValueError, match="lengths that contradict"):
        Step(library, Case([(40, 1)], positions=(1 << 30,)))
    with pytest.raises(ValueError, match="lengths that contradict"):
        Step(library, Case([(40, 1)], positions=(-1,)))
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
    with pytest.raises(ValueError, match="-64 bytes apart: bad geometry"):
        Step(library, Case([(40, 1)], gap_bytes=-64 - 16 * 512))
    with pytest.raises(ValueError, match="bytes apart: bad geometry"):
        Step(library, Case([(40, 1)], gap_bytes=32))
    with pytest.raises(ValueError, match="ISA sse9"):
        Step(library, Case([(40, 1)], isa="sse9"))


def test_block_bytes_show_padding(library: CpuKernelLibrary) -> None:
    for block_size, padded in ((16, 16), (32, 32), (24, 32), (1, 16)):
        step = Step(library, Case([(4, 1)], (2, 2), (64, 72), BF16, block_size))
        assert step.cache.block_bytes == padded * 2 * (64 + 80) * 2
        step.close()
