# SPDX-License-Identifier: Apache-2.0
"""NaN in one request shows in its rows and heads, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from cpu_step import BF16, FP16, FP32, Case, Step

from vllm_attn_offload.native.attention import CpuKernelLibrary, load_cpu_library

_LIBRARY = load_cpu_library()
ISAS = [] if _LIBRARY is None else _LIBRARY.isa_names
POISONED, NUM_HEADS, KV_HEADS = 1, 4, 2


def run(library: CpuKernelLibrary, case: Case, where: str) -> tuple[torch.Tensor, ...]:
    """Output and LSE of all rows, with NaN in KV head 0 of request 1."""
    step = Step(library, case)
    begin = int(step.rows[POISONED])
    end = int(step.rows[POISONED + 1])
    if where == "query":
        step.query[begin:end, : NUM_HEADS // KV_HEADS, 3] = torch.nan
    elif where == "first key":
        step.keys[POISONED][0, 0, 3] = torch.nan
    elif where == "all keys":
        step.keys[POISONED][:, 0] = torch.nan
    elif where == "first value":
        step.values[POISONED][0, 0] = torch.nan
    step.store()
    out, lse = step.run()
    step.close()
    return (
        out[begin:end],
        lse[begin:end],
        out[:begin],
        out[end:],
        lse[:begin],
        lse[end:],
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 17, 63, 64, 65, 200])
def test_poison_stays_visible(library: CpuKernelLibrary, isa: str, tokens: int) -> None:
    for dtype in (BF16, FP16, FP32):
        requests = [(40, 1), (tokens, 1), (70, 1)]
        heads = (NUM_HEADS, KV_HEADS)
        case = Case(requests, heads, dtype=dtype, isa=isa, has_sinks=tokens == 17)
        clean = run(library, case, "nowhere")[2:]
        for where in ("query", "first key", "all keys"):
            out, lse, *others = run(library, case, where)
            assert out[:, :2].isnan().all(), (where, dtype)
            assert lse[:, :2].isnan().all(), (where, dtype)
            assert out[:, 2:].isfinite().all(), (where, dtype)
            assert lse[:, 2:].isfinite().all(), (where, dtype)
            assert all(map(torch.equal, others, clean)), (where, dtype)


def test_poisoned_value(library: CpuKernelLibrary) -> None:
    for tokens in (1, 17, 63, 64, 65, 200):
        requests = [(40, 1), (tokens, 1), (70, 1)]
        out, lse, *_ = run(
            library, Case(requests, (NUM_HEADS, KV_HEADS)), "first value"
        )
        assert out[:, :2].isnan().all()
        assert out[:, 2:].isfinite().all()
        assert lse.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_poison_survives_a_merge(library: CpuKernelLibrary, threads: int) -> None:
    """One NaN in one part of a context that threads split."""
    case = Case([(40, 1), (9000, 1), (70, 1)], (NUM_HEADS, KV_HEADS), threads=threads)
    out, lse, *others = run(library, case, "first key")
    assert out[:, :2].isnan().all()
    assert lse[:, :2].isnan().all()
    assert all(x.isfinite().all() for x in (*others, out[:, 2:], lse[:, 2:]))


def test_no_key_is_not_poison(library: CpuKernelLibrary) -> None:
    step = Step(library, Case([(0, 1), (3, 5)]))
    out, lse = step.run()
    step.close()
    assert not out.isnan().any()
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))
