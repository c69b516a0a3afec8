# SPDX-License-Identifier: Apache-2.0
"""A layer that is attended in slices gives bit for bit what one call gives."""

from __future__ import annotations

import threading

import pytest
import torch
from cpu_step import BF16, FP16, FP32, Case, Step

from vllm_attn_offload.native.attention import CpuKernelLibrary

LONG = [(9000, 1), (40, 1), (3000, 1)]
CASES = {
    "decode-gqa": Case(LONG, (32, 8), (128, 128), BF16),
    "decode-gqa-two-threads": Case(LONG, (32, 8), (128, 128), BF16, threads=2),
    "decode-three-threads": Case(LONG, (4, 4), (64, 64), FP16, 24, threads=3),
    "prefill-chunk": Case([(3000, 700), (500, 3)], (8, 2), (128, 128), BF16),
    "prefill-two-threads": Case([(3000, 700)], (8, 2), (128, 128), FP32, threads=2),
    "latent": Case([(3000, 9), (70, 1)], (40, 1), (576, 512), BF16, 64, threads=2),
    "window": Case([(3000, 200), (900, 1)], (8, 2), dtype=BF16, window=333),
    "sinks-alibi-cap": Case(
        LONG, (8, 2), threads=2, soft_cap=5.0, has_sinks=True, has_alibi=True
    ),
    "subset": Case([(3000, 40), (7, 1)], (8, 2), dtype=BF16, share=(1, 3)),
    "not-causal": Case([(3000, 40)], (4, 1), positions=(3000,), threads=2),
}


@pytest.mark.parametrize("name", CASES)
def test_slices(library: CpuKernelLibrary, name: str) -> None:
    step = Step(library, CASES[name])
    whole = step.run()
    assert step.num_slices == 1
    for _ in range(3):
        sliced = step.run(budget_us=1)
        assert step.num_slices > 3
        assert all(map(torch.equal, sliced, whole))
    assert all(map(torch.equal, step.run(), whole))
    step.close()


@pytest.mark.parametrize("isa", ["avx2-pairs", "portable", "portable-pairs"])
def test_slices_of_other_kernels(library: CpuKernelLibrary, isa: str) -> None:
    """The pair kernels keep the query in another form than the others."""
    if isa not in library.isa_names:
        pytest.skip(f"this CPU does not run {isa}")
    requests = [(900, 60), (3000, 1)]
    step = Step(library, Case(requests, (8, 2), (128, 128), BF16, isa=isa, threads=2))
    whole = step.run()
    sliced = step.run(budget_us=1)
    assert step.num_slices > 3
    assert all(map(torch.equal, sliced, whole))
    step.close()


def test_one_request_is_sliced_within_its_rows(library: CpuKernelLibrary) -> None:
    """One row over a long context is a single piece on one thread."""
    step = Step(library, Case([(60_000, 1)], (1, 1), (128, 128), BF16))
    whole = step.run()
    sliced = step.run(budget_us=1)
    assert step.num_slices > 3
    assert all(map(torch.equal, sliced, whole))
    step.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_unfinished_layer_is_abandoned(library: CpuKernelLibrary, threads: int) -> None:
    case = Case([(3000, 100), (2000, 1)], (8, 2), (128, 128), BF16, threads=threads)
    step = Step(library, case)
    whole = step.run()
    call = step.attend_input(torch.empty_like(whole[0]), torch.empty_like(whole[1]))
    for calls in (1, 2, 5):
        for _ in range(calls):
            assert not library.attend(step.pool, step.plan, call, 1)
        step.plan_step()
        assert all(map(torch.equal, step.run(), whole))
    assert not library.attend(step.pool, step.plan, call, 1)
    step.close()


def test_a_short_context_is_one_slice(library: CpuKernelLibrary) -> None:
    """However small the budget, what takes less than a look at the clock is done."""
    step = Step(library, Case([(60, 1)], (1, 1)))
    step.run(budget_us=1)
    assert step.num_slices == 1
    step.close()


def test_two_sessions_take_turns(library: CpuKernelLibrary) -> None:
    """Slices of two plans alternate on one pool, and neither disturbs the other."""
    cases = [
        Case([(2500, 30), (40, 1)], (8, 2), (128, 128), BF16, threads=2, seed=seed)
        for seed in (1, 2)
    ]
    steps = [Step(library, case) for case in cases]
    alone = [step.run() for step in steps]
    pools = [step.pool for step in steps]
    wrong: list[int] = []

    def hammer(index: int) -> None:
        for _ in range(10):
            got = steps[index].run(budget_us=1)
            if not all(map(torch.equal, got, alone[index])):
                wrong.append(index)

    steps[1].pool = pools[0]
    threads = [threading.Thread(target=hammer, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps[1].pool = pools[1]
    for step in steps:
        step.close()
    assert not wrong
