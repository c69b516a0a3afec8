# SPDX-License-Identifier: Apache-2.0
"""Who attends prefill chunks on this CPU."""

from __future__ import annotations

import pytest
import torch

from vllm_attn_offload.attention.cpu_prefill import attend_locally
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.local_prefill import LocalPrefill
from vllm_attn_offload.client.step_partition import Prefill
from vllm_attn_offload.native.attention import load_cpu_library

PREFILLS = (Prefill(1, 90, False), Prefill(90, 92, True), Prefill(95, 300, False))


def _attend(
    prefill: LocalPrefill, head_size: int, sizes: LayerAttention, num_tokens: int = 301
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, and those of torch."""
    q = torch.randn(num_tokens, 6, head_size)
    k, v = (torch.randn(num_tokens, 2, head_size) for _ in range(2))
    output, expected = torch.empty_like(q), torch.empty_like(q)
    lse = prefill.attend(q, k, v, output, PREFILLS, sizes)
    return output, lse, expected, attend_locally(q, k, v, expected, PREFILLS, sizes)


def _uses_kernels(prefill: LocalPrefill) -> bool:
    return prefill._native is not None and bool(prefill._native._plans)


@pytest.mark.parametrize("head_size", [12, 40, 64, 592])
def test_equals_torch(head_size: int) -> None:
    """Also with head sizes that only torch has, and with scales of fp8 blocks."""
    library = load_cpu_library()
    assert library is not None
    has_kernels = (
        head_size in (40, 64)
        and library.isa_names[0].startswith("avx")
        and not torch.cpu._is_amx_tile_supported()
    )
    prefill = LocalPrefill()
    for window in (0, 33, 0):
        sizes = LayerAttention(0.1, window, k_scale=0.5, v_scale=3.0)
        output, lse, expected, expected_lse = _attend(prefill, head_size, sizes)
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5)
    assert _uses_kernels(prefill) == has_kernels


def test_steps_of_other_lengths() -> None:
    """Chunks are planned again where the rows behind them are others."""
    prefill = LocalPrefill()
    for num_tokens in (301, 300, 400, 301):
        sizes = LayerAttention(0.2)
        output, lse, expected, _ = _attend(prefill, 32, sizes, num_tokens)
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)
        assert (lse[300:] == -torch.inf).all()
