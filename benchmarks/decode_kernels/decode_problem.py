# SPDX-License-Identifier: Apache-2.0
"""Decode problems with known answers, for tests and for the check before a benchmark.

Every slot that no row may see is NaN, so that reading it cannot go unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from decode_kernels.decode_cases import FP32, DecodeCase
from vllm_attn_offload.triton_kernels.decode_plan import (
    DecodeAttentionPlan,
    plan_decode_attention,
)
from vllm_attn_offload.triton_kernels.paged_decode_attention import (
    paged_decode_attention,
)
from vllm_attn_offload.triton_kernels.reference import naive_paged_decode_attention
from vllm_attn_offload.triton_kernels.tiles import architecture_of, choose_decode_tile


@dataclass
class DecodeProblem:
    """Inputs of one case on a device; ``clean_*`` are the caches without NaN."""

    plan: DecodeAttentionPlan
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    clean_key_cache: torch.Tensor
    clean_value_cache: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    num_blocks: torch.Tensor | None
    block_table: torch.Tensor
    options: dict[str, Any]
    # Of the plan.
    query_positions: torch.Tensor | None = None
    first_block: torch.Tensor | None = None

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the kernel into NaN-filled buffers."""
        num_tokens, num_heads, _ = self.query.shape
        shape = (num_tokens, num_heads, self.plan.v_head_size)
        self.plan.partial_out.fill_(math.nan)
        self.plan.partial_lse.fill_(math.nan)
        return paged_decode_attention(
            self.query,
            self.key_cache,
            self.value_cache,
            self.plan,
            block_table=self.block_table,
            out=self.query.new_full(shape, math.nan),
            lse=self.query.new_full(shape[:2], math.nan, dtype=FP32),
            **self.options,
        )

    def reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The naive answer with every operation in ``dtype``."""
        return naive_paged_decode_attention(
            self.query,
            self.clean_key_cache,
            self.clean_value_cache,
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            num_blocks=self.num_blocks,
            query_positions=self.query_positions,
            first_block=self.first_block,
            sliding_window=self.plan.sliding_window,
            compute_dtype=dtype,
            **self.options,
        )


def build_problem(case: DecodeCase, device: torch.device) -> DecodeProblem:
    """Draw the inputs of a case from a fixed seed and plan them."""
    generator = torch.Generator().manual_seed(0)
    query_heads, kv_heads = case.heads
    v_head_size = case.v_head_size or case.head_size
    query_lens = case.query_lens or tuple(min(1, n) for n in case.seq_lens)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    table, positions, num_blocks = _draw_table(case, generator)
    query_positions = torch.tensor(case.positions).int() if case.positions else None
    first_block = torch.tensor(case.first_blocks).int() if case.first_blocks else None
    shape = (int(table.max()) + 2, kv_heads, case.block_size)

    def draw(*size: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    kv_dtype = case.kv_dtype or case.dtype
    keys = draw(*shape, case.head_size, dtype=kv_dtype)
    values = draw(*shape, v_head_size, dtype=kv_dtype)
    seen = _seen_slots(case, query_lens, table, positions, num_blocks, shape[0])
    bad_keys, bad_values = (_hide(cache, ~seen) for cache in (keys, values))
    if case.is_latent:
        values, bad_values = keys[..., :v_head_size], bad_keys[..., :v_head_size]
    scale_heads = {"": 0, "tensor": 1, "head": kv_heads}[case.scales]
    scales = 0.5 + torch.rand(2, max(1, scale_heads), generator=generator).to(device)
    return DecodeProblem(
        plan=plan_decode_attention(
            _make_plan(case, query_lens, device),
            starts,
            lens,
            num_blocks if case.is_subset else None,
            query_positions=query_positions,
            first_block=first_block,
        ),
        query=draw(sum(query_lens), query_heads, case.head_size, dtype=case.dtype),
        key_cache=bad_keys,
        value_cache=bad_values,
        clean_key_cache=keys,
        clean_value_cache=values,
        query_start_loc=starts,
        seq_lens=lens,
        num_blocks=num_blocks if case.is_subset else None,
        block_table=table.to(device),
        options=_options(case, positions.to(device), scales, draw),
        query_positions=query_positions,
        first_block=first_block,
    )


def _options(
    case: DecodeCase,
    positions: torch.Tensor,
    scales: torch.Tensor,
    draw: Callable[..., torch.Tensor],
) -> dict[str, Any]:
    return {
        "softmax_scale": case.head_size**-0.5,
        "block_positions": positions if case.is_subset else None,
        "soft_cap": case.soft_cap,
        "sinks": draw(case.heads[0]) if case.has_sinks else None,
        "alibi_slopes": draw(case.heads[0]).abs() if case.has_alibi else None,
        "k_scale": scales[0] if case.scales else None,
        "v_scale": scales[1] if case.scales else None,
    }


def _hide(cache: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Copy a cache ``[blocks, KV heads, slots, size]`` with NaN in hidden slots."""
    mask = hidden[:, None, :, None].to(cache.device)
    return cache.float().masked_fill(mask, math.nan).to(cache.dtype)


def _make_plan(
    case: DecodeCase,
    query_lens: tuple[int, ...],
    device: torch.device,
) -> DecodeAttentionPlan:
    query_heads, kv_heads = case.heads
    kv_dtype = case.kv_dtype or case.dtype
    tile = choose_decode_tile(
        architecture_of(device),
        case.head_size,
        max(query_lens) * (query_heads // kv_heads),
        kv_dtype.itemsize,
    )
    return DecodeAttentionPlan(
        max_num_seqs=len(case.seq_lens),
        max_query_len=max(query_lens),
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        head_size=case.head_size,
        v_head_size=case.v_head_size,
        block_size=case.block_size,
        query_dtype=case.dtype,
        kv_cache_dtype=kv_dtype,
        device=device,
        sliding_window=case.window,
        tile=replace(tile, native_fp8=tile.native_fp8 and case.native_fp8),
        num_slots=case.num_slots,
    )


def _draw_table(
    case: DecodeCase, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shuffled blocks; a subset keeps every second block of a request, out of order."""
    firsts = case.first_blocks or (0,) * len(case.seq_lens)
    held = [
        list(range(first, -(-n // case.block_size)))
        for first, n in zip(firsts, case.seq_lens, strict=True)
    ]
    if case.is_subset:
        held = [columns[::2][::-1] for columns in held]
    num_blocks = torch.tensor([len(columns) for columns in held], dtype=torch.int32)
    width = int(num_blocks.max()) + 2
    total = int(num_blocks.sum())
    blocks = iter(torch.randperm(total, generator=generator).tolist())
    # What follows the held blocks points to a block of NaN.
    table = torch.full((len(held), width), total, dtype=torch.int32)
    positions = torch.zeros_like(table)
    for seq, columns in enumerate(held):
        for index, column in enumerate(columns):
            table[seq, index] = next(blocks)
            positions[seq, index] = column * case.block_size
    return table, positions, num_blocks


def _seen_slots(
    case: DecodeCase,
    query_lens: tuple[int, ...],
    table: torch.Tensor,
    positions: torch.Tensor,
    num_blocks: torch.Tensor,
    total_blocks: int,
) -> torch.Tensor:
    """``[total_blocks, block_size]``: slots that at least one row sees."""
    seen = torch.zeros(total_blocks, case.block_size, dtype=torch.bool)
    offsets = torch.arange(case.block_size)
    for seq, seq_len in enumerate(case.seq_lens):
        first = case.positions[seq] if case.positions else seq_len - query_lens[seq]
        oldest, newest = 0, min(seq_len, first + query_lens[seq])
        if case.window is not None:
            oldest = first - case.window + 1
        for index in range(int(num_blocks[seq])):
            position = int(positions[seq, index]) + offsets
            seen[table[seq, index]] = (position >= oldest) & (position < newest)
    return seen


def find_errors(problem: DecodeProblem) -> list[str]:
    """Run a problem; describe every way in which the answer is not good enough.

    The output may err at most twice as much as the reference does when it rounds to
    the kernel's dtype after every operation; in fp32 on a GPU four times, because its
    exponential function is good to two units of the last place.
    """
    out, lse = problem.run()
    exact, exact_lse = problem.reference(torch.float64)
    rounded, _ = problem.reference(problem.query.dtype)
    errors = []
    if not bool(torch.isfinite(out).all()):
        errors.append("out is not finite")
    if not torch.equal(lse == -math.inf, exact_lse == -math.inf):
        errors.append("lse is -inf for other rows than in the reference")
    own_error = (rounded - exact).abs().max().item()
    floor = torch.finfo(problem.query.dtype).eps * exact.abs().max().item()
    is_coarse = out.is_cuda and problem.query.dtype == torch.float32
    limit = (4 if is_coarse else 2) * max(own_error, floor)
    error = (out - exact).abs().max().item()
    if not error <= limit:
        errors.append(f"out errs by {error:.2e}, limit {limit:.2e}")
    finite = exact_lse != -math.inf
    lse_error = (lse - exact_lse)[finite].abs().max().item() if finite.any() else 0.0
    lse_limit = 1e-5 * max(1.0, exact_lse[finite].abs().max().item())
    if not lse_error <= lse_limit:
        errors.append(f"lse errs by {lse_error:.2e}, limit {lse_limit:.2e}")
    return errors
