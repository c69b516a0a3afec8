# SPDX-License-Identifier: Apache-2.0
"""Merging partial states against the reference, with empty partials."""

from __future__ import annotations

import math

import pytest
import torch
from vllm_attn_offload.triton_kernels import merge_attn_states
from vllm_attn_offload.triton_kernels.reference import naive_merge_attn_states

CASES = [
    (1, 3, 4, 64, torch.float32),
    (2, 5, 8, 128, torch.bfloat16),
    (3, 2, 3, 80, torch.float16),
    (17, 3, 4, 96, torch.float32),
    (40, 1, 2, 512, torch.bfloat16),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"parts{c[0]}-size{c[3]}-{str(c[4])[6:]}"
)
def test_merge_attn_states(
    case: tuple[int, int, int, int, torch.dtype], device: torch.device
) -> None:
    *shape, dtype = case
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(shape, generator=generator).to(dtype).to(device)
    lses = 5 * torch.randn(shape[:3], generator=generator)
    # Rising, so that every step of the loop rescales what it has.
    lses = lses.sort(dim=0).values.to(device)
    # The last partial is empty in the first row, written as other kernels do in the
    # second, and its output was never written.
    empty = shape[0] > 1
    if empty:
        lses[-1, 0], lses[-1, 1:2] = -math.inf, math.inf
        outs[-1, :2] = math.nan
    out = torch.full_like(outs[0], math.nan)
    lse = torch.full_like(lses[0], math.nan)
    result = merge_attn_states(outs, lses, out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    exact, exact_lse = naive_merge_attn_states(outs.double(), lses)
    # The interpreter's fp32 -> bf16 cast may be one unit off, and a weight inherits the
    # rounding of its lse.
    largest_lse = lses[lses.isfinite()].abs().max().item()
    unit = 2 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * largest_lse
    atol = unit * exact.abs().max().item()
    torch.testing.assert_close(out.float(), exact, atol=atol, rtol=0)
    torch.testing.assert_close(lse, exact_lse, atol=1e-5, rtol=1e-6)


def test_merge_attn_states_of_nothing_is_empty(device: torch.device) -> None:
    outs = torch.full((3, 2, 1, 64), math.nan, device=device)
    lses = torch.full((3, 2, 1), -math.inf, device=device)
    out, lse = merge_attn_states(outs, lses)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_merge_attn_states_takes_far_lses(device: torch.device) -> None:
    outs = torch.tensor([1.0, 2.0], device=device).view(2, 1, 1, 1).repeat(1, 1, 1, 16)
    lses = torch.tensor([1e4, -1e4], device=device).view(2, 1, 1)
    out, lse = merge_attn_states(outs, lses)
    assert (out == 1).all()
    assert lse.item() == 1e4


def test_merge_attn_states_refuses_other_shapes(device: torch.device) -> None:
    outs, lses = torch.zeros(2, 3, 4, 64), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="Pass \\[partials, tokens"):
        merge_attn_states(outs, lses[:, :2])
    with pytest.raises(ValueError, match="out \\(3, 3, 64\\)"):
        merge_attn_states(outs, lses, out=torch.zeros(3, 3, 64))
    with pytest.raises(ValueError, match="contiguous there"):
        merge_attn_states(outs.transpose(2, 3), torch.zeros(2, 3, 64))
