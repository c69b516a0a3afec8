# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels on an fp8 cache: stored as torch rounds, attended exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpu_step import BF16, FP8, FP16, FP32, Case, Step, quantized

from vllm_attn_offload.native.attention import CpuKernelLibrary, load_cpu_library
from vllm_attn_offload.native.kernel_inputs import DTYPES, StoreInput

_LIBRARY = load_cpu_library()
ISAS = [] if _LIBRARY is None else _LIBRARY.isa_names
#: With AVX512_VBMI; where it is missing the shifts are `avx512-bf16` themselves.
NAN_ISA = "avx512-bf16" if "avx512-bf16-shifts" in ISAS else None
RAGGED = [(1, 1), (15, 1), (16, 1), (17, 1), (64, 1), (65, 1), (301, 1)]
# Scales under which randn is cut off at the top, fills the middle, is mostly subnormal.
SCALES = {"cut": (0.004, 0.003), "middle": (0.11, 0.37), "subnormal": (60.0, 90.0)}


def check(library: CpuKernelLibrary, case: Case) -> None:
    step = Step(library, replace(case, cache_dtype=FP8))
    out, lse = step.run()
    expected, expected_lse = step.reference()
    step.close()
    # Pair kernels round probabilities to bf16; everything else stays in fp32.
    isa = case.isa or step.cache.isa
    is_rounded = case.dtype == BF16 and ("pairs" in isa or "bf16" in isa)
    tolerance = 1e-2 if is_rounded else 3e-6
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=3e-6, rtol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_attend_isa(library: CpuKernelLibrary, isa: str, dtype: torch.dtype) -> None:
    case = Case(RAGGED, (10, 2), (128, 128), dtype, isa=isa, scales=SCALES["middle"])
    check(library, case)
    # Chunks, odd tiles and rows that start and end within a tile.
    chunks = replace(case, requests=[(70, 37), (19, 3)], heads=(3, 3), window=21)
    check(library, replace(chunks, head_sizes=(72, 40), block_size=24))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_scales(
    library: CpuKernelLibrary, isa: str, scales: tuple[float, float]
) -> None:
    for dtype in (BF16, FP32):
        check(library, Case(RAGGED, (4, 2), dtype=dtype, isa=isa, scales=scales))


@pytest.mark.parametrize("isa", ISAS)
def test_rows(library: CpuKernelLibrary, isa: str) -> None:
    """Numbers of rows that a speculative step, or a group of heads, makes: each size
    and mix of the groups in which kernels take them."""
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16):
        case = Case([(rows + 50, rows)], (1, 1), isa=isa, scales=SCALES["middle"])
        check(library, case)
        check(library, Case([(90, 1)], (rows, 1), dtype=BF16, isa=isa))


CASES = {
    "hs80-block32": Case(RAGGED, (4, 2), (80, 80), BF16, block_size=32),
    "hs256-soft-cap": Case(RAGGED, (8, 1), (256, 256), BF16, soft_cap=5.0),
    "latent-576-512": Case(
        [(1, 1), (130, 1)], (40, 1), (576, 512), BF16, block_size=64
    ),
    "hs8": Case(RAGGED, (3, 1), (8, 8)),
    "block1": Case([(5, 1), (20, 1)], (2, 1), dtype=BF16, block_size=1),
    "block7": Case(RAGGED, (2, 1), dtype=FP16, block_size=7),
    "group3-two-threads": Case(RAGGED, (9, 3), dtype=BF16, threads=2),
    "split-sinks": Case([(9000, 1)], (2, 1), (128, 128), threads=2, has_sinks=True),
    "alibi-window": Case([(300, 1), (100, 20)], dtype=BF16, window=33, has_alibi=True),
    "subset-gap": Case([(100, 4), (7, 1)], dtype=BF16, share=(0, 3), gap_bytes=64),
    "nothing": Case([(0, 0), (9, 0), (0, 1), (3, 2)]),
}


@pytest.mark.parametrize("name", CASES)
def test_attend(library: CpuKernelLibrary, name: str) -> None:
    check(library, replace(CASES[name], scales=SCALES["middle"]))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_slices(library: CpuKernelLibrary, dtype: torch.dtype) -> None:
    requests = [(3000, 30), (2000, 1)]
    case = Case(requests, (8, 2), (128, 128), dtype, threads=2, cache_dtype=FP8)
    step = Step(library, case)
    whole = step.run()
    sliced = step.run(budget_us=1)
    assert step.num_slices > 3
    assert all(map(torch.equal, sliced, whole))
    step.close()


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """All 2^16 numbers of 16 bits; of fp32 what lies around each fp8 rounding point."""
    if dtype != FP32:
        every = torch.arange(-(2**15), 2**15).short().view(dtype)
        return torch.where(every.isnan(), 0, every)
    codes = torch.arange(256).byte().view(FP8).float()
    exact = codes[codes.isfinite()].sort().values
    middle = (exact[1:] + exact[:-1]) / 2
    points = torch.cat([exact, middle, torch.tensor([464.0, 480.0, 1e38, torch.inf])])
    up = points.nextafter(torch.tensor(torch.inf))
    down = points.nextafter(torch.tensor(-torch.inf))
    points = torch.cat([points, up, down, -points, torch.randn(5000) * 50])
    return torch.cat([points, torch.zeros(-len(points) % 64)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_store_rounds_as_torch(
    library: CpuKernelLibrary, isa: str, dtype: torch.dtype
) -> None:
    """One token a request: its value is the output, and the LSE of a query that picks
    one dimension is that of its key."""
    tokens = numbers(dtype).view(-1, 1, 64)
    case = Case([(1, 1)] * len(tokens), (64, 1), dtype=dtype, isa=isa, cache_dtype=FP8)
    # A scale that divides inexactly; products with it are not compared.
    for scale in (1.0, 0.3):
        step = Step(library, replace(case, scales=(scale, scale)))
        step.keys = [token[None] for token in tokens.roll(1, 0)]
        step.values = [token[None] for token in tokens]
        step.store()
        step.query = torch.eye(64).to(dtype).repeat(len(tokens), 1, 1)
        step.scale = 1.0
        step.case = replace(step.case, scales=(1.0, 1.0))
        out, lse = step.run()
        step.close()
        value = quantized(tokens, scale).float()
        key = quantized(tokens.roll(1, 0), scale).float()
        assert torch.equal(out, value.expand(-1, 64, -1))
        assert torch.equal(lse, key[:, 0])


def keeps_nan(isa: str, dtype: torch.dtype) -> bool:
    """Kernels that look fp8 up have NaN; those that shift its bits read 480."""
    return "portable" in isa or (dtype == BF16 and isa == NAN_ISA)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_nan_is_stored(library: CpuKernelLibrary, isa: str, dtype: torch.dtype) -> None:
    case = Case([(40, 1), (20, 1)], (2, 2), dtype=dtype, isa=isa, cache_dtype=FP8)
    step = Step(library, case)
    clean, clean_lse = step.run()
    step.values[0][:, 0] = torch.nan
    step.store()
    out, lse = step.run()
    assert torch.equal(out[1], clean[1])
    assert torch.equal(out[0, 1], clean[0, 1])
    if keeps_nan(isa, dtype):
        assert out[0, 0].isnan().all()
    else:
        # Probabilities rounded to bf16 do not sum to 1.
        torch.testing.assert_close(
            out[0, 0].float(), torch.full((64,), 480.0), rtol=2**-8, atol=0
        )
    assert torch.equal(lse, clean_lse) or keeps_nan(isa, dtype)
    step.keys[0][:, 0] = torch.nan
    step.store()
    _, lse = step.run()
    step.close()
    assert torch.equal(lse[1], clean_lse[1])
    assert bool(lse[0, 0].isnan()) == keeps_nan(isa, dtype)


def test_half_the_bytes(library: CpuKernelLibrary) -> None:
    for block_size in (1, 16, 24, 32):
        bytes_of = []
        for dtype in (FP8, BF16):
            case = Case([(4, 1)], (2, 2), (64, 72), BF16, cache_dtype=dtype)
            step = Step(library, replace(case, block_size=block_size))
            bytes_of.append(step.cache.block_bytes)
            step.close()
        assert bytes_of[0] * 2 == bytes_of[1]
        assert bytes_of[0] % 64 == 0


def test_only_caches_are_fp8(library: CpuKernelLibrary) -> None:
    step = Step(library, Case([(40, 1)], cache_dtype=FP8))
    slots = torch.tensor([0])
    call = StoreInput(slot_mapping=slots.data_ptr(), num_tokens=1)
    call.source_dtype = DTYPES["fp8_e4m3"]
    with pytest.raises(ValueError, match="fp8 is for caches only"):
        library.store(step.pool, step.cache, call)
    out, lse = torch.empty(1, 4, 64), torch.empty(1, 4)
    attend = step.attend_input(out, lse)
    attend.query_dtype = DTYPES["fp8_e4m3"]
    with pytest.raises(ValueError, match="fp8 is for caches only"):
        library.attend(step.pool, step.plan, attend)
    step.close()
