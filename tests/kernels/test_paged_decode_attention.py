# SPDX-License-Identifier: Apache-2.0
"""The decode kernel against the reference, and what the reference cannot show."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from decode_kernels.decode_cases import CASES, DecodeCase
from decode_kernels.decode_problem import build_problem, find_errors
from vllm_attn_offload.triton_kernels import (
    DecodeAttentionPlan,
    paged_decode_attention,
    plan_decode_attention,
    prepare_decode_attention,
)
from vllm_attn_offload.triton_kernels.reference import (
    naive_merge_attn_states,
    naive_paged_decode_attention,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_paged_decode_attention(case: DecodeCase, device: torch.device) -> None:
    assert find_errors(build_problem(case, device)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this host")
def test_paged_decode_attention_replays_in_a_cuda_graph() -> None:
    case = DecodeCase("graph", (700, 30), dtype=torch.bfloat16, num_slots=64)
    problem = build_problem(case, torch.device("cuda"))
    plan = problem.plan
    plan.fixed_grid = True
    out, lse = problem.run()
    graph = torch.cuda.CUDAGraph()
    arguments = (problem.query, problem.key_cache, problem.value_cache, plan)
    options = {"block_table": problem.block_table, **problem.options}
    with torch.cuda.graph(graph):
        paged_decode_attention(*arguments, out=out, lse=lse, **options)
    for lens in ((700, 30), (16, 30), (350, 1)):
        problem.seq_lens = torch.tensor(lens, dtype=torch.int32)
        plan_decode_attention(plan, problem.query_start_loc, problem.seq_lens)
        graph.replay()
        exact, _ = problem.reference(torch.float64)
        assert (out - exact).abs().max().item() < 0.02


def test_prepared_launches_attend_other_tensors(device: torch.device) -> None:
    """Only compiled kernels are launched again, and only for pointers aligned alike."""
    case = DecodeCase("prepared", (300, 17, 64), dtype=torch.bfloat16, num_slots=64)
    problem = build_problem(case, device)
    options = {"block_table": problem.block_table}
    options["softmax_scale"] = problem.options["softmax_scale"]
    caches = (problem.key_cache, problem.value_cache)
    out, lse = problem.run()
    expected, other = (out.clone(), lse.clone()), torch.empty_like(out)
    launches = prepare_decode_attention(
        problem.query, *caches, problem.plan, out=other, lse=lse, **options
    )
    assert torch.equal(other, expected[0])
    names = ("query_ptr", "key_cache_ptr", "value_cache_ptr", "out_ptr", "lse_ptr")
    tensors = (problem.query.clone(), *(cache.clone() for cache in caches), out, lse)
    pointers = dict(zip(names, (x.data_ptr() for x in tensors), strict=True))
    stream = 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream().cuda_stream
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
    is_compiled = device.type == "cuda"
    assert len(launches) == 2
    assert all(x.again(pointers, stream) == is_compiled for x in launches)
    if is_compiled:
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
    assert not launches[0].again(pointers | {"query_ptr": 2}, stream)


def test_paged_decode_attention_reuses_a_plan_for_shorter_steps(
    device: torch.device,
) -> None:
    case = DecodeCase("steps", (300, 17, 64), num_slots=32)
    problem = build_problem(case, device)
    plan = problem.plan
    plan.fixed_grid = True
    buffers = (plan.work.data_ptr(), plan.partial_out.data_ptr())
    assert find_errors(problem) == []
    problem.seq_lens = torch.tensor([31, 1, 64], dtype=torch.int32)
    plan_decode_attention(plan, problem.query_start_loc, problem.seq_lens)
    assert find_errors(problem) == []
    assert (plan.work.data_ptr(), plan.partial_out.data_ptr()) == buffers


def test_paged_decode_attention_over_two_nodes_merges_to_the_whole(
    device: torch.device,
) -> None:
    case = DecodeCase("whole", (3, 70, 129), (3, 1, 2), has_sinks=True, has_alibi=True)
    whole = build_problem(case, device)
    exact, exact_lse = whole.reference(torch.float64)
    block_size = case.block_size
    outs, lses = [], []
    for node in range(2):
        held = [range(node, -(-n // block_size), 2) for n in case.seq_lens]
        num_blocks = torch.tensor([len(columns) for columns in held]).int()
        table = whole.block_table[:, node::2].contiguous()
        positions = (torch.arange(table.shape[1]).int() * 2 + node) * block_size
        plan_decode_attention(
            whole.plan, whole.query_start_loc, whole.seq_lens, num_blocks
        )
        options = {**whole.options, "sinks": whole.options["sinks"] if node else None}
        options["block_positions"] = positions.to(device).expand_as(table).contiguous()
        out, lse = paged_decode_attention(
            whole.query,
            whole.key_cache,
            whole.value_cache,
            whole.plan,
            block_table=table,
            **options,
        )
        outs.append(out)
        lses.append(lse)
    assert torch.isinf(lses[1]).sum() == 0  # sinks: a row without keys still has weight
    out, lse = naive_merge_attn_states(torch.stack(outs), torch.stack(lses))
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-6, rtol=2e-6)


def test_paged_decode_attention_on_a_head_range_needs_no_copy(
    device: torch.device,
) -> None:
    problem = build_problem(DecodeCase("shard", (33, 16), heads=(8, 4)), device)
    shard = build_problem(DecodeCase("shard", (33, 16), heads=(4, 2)), device)
    out = problem.query.new_full((2, 8, 64), math.nan)
    lse = problem.query.new_full((2, 8), math.nan)
    paged_decode_attention(
        problem.query[:, 2:6],
        problem.key_cache[:, 1:3],
        problem.value_cache[:, 1:3],
        shard.plan,
        block_table=problem.block_table,
        softmax_scale=problem.options["softmax_scale"],
        out=out[:, 2:6],
        lse=lse[:, 2:6],
    )
    exact, exact_lse = problem.reference(torch.float64)
    torch.testing.assert_close(out[:, 2:6].double(), exact[:, 2:6], atol=2e-6, rtol=0)
    torch.testing.assert_close(lse[:, 2:6].double(), exact_lse[:, 2:6])
    assert out[:, :2].isnan().all()
    assert out[:, 6:].isnan().all()


def test_paged_decode_attention_addresses_beyond_32_bits(device: torch.device) -> None:
    # Never touched, so only virtual: 2,064 blocks x 2^20 one-byte numbers.
    block, blocks = 2**20, 2064
    shape = (blocks, 1, 16, block // 16)
    key_cache = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    key_cache = key_cache[..., :64]
    used = [blocks - 1, 3, blocks - 2]
    assert key_cache.stride(0) * used[0] > 2**31
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((3, 1, 16, 64), generator=generator)
    key_cache[used] = rows.to(key_cache.dtype).to(device)
    query = torch.randn((1, 2, 64), generator=generator).to(device)
    plan = DecodeAttentionPlan(
        max_num_seqs=1,
        num_query_heads=2,
        num_kv_heads=1,
        head_size=64,
        block_size=16,
        query_dtype=query.dtype,
        kv_cache_dtype=key_cache.dtype,
        device=device,
    )
    steps = (torch.tensor([0, 1]).int(), torch.tensor([40]).int())
    plan_decode_attention(plan, *steps)
    table = torch.tensor([used], dtype=torch.int32, device=device)
    out, _ = paged_decode_attention(
        query, key_cache, key_cache, plan, block_table=table, softmax_scale=0.1
    )
    exact, _ = naive_paged_decode_attention(
        query, key_cache, key_cache, *steps, table, softmax_scale=0.1
    )
    torch.testing.assert_close(out, exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("block_size", [16, 64, 1386])
def test_paged_decode_attention_of_the_longest_request(
    device: torch.device, block_size: int
) -> None:
    """The last slots of 2^30 tokens, all in block 0, read only that block."""
    tokens, window = 2**30, 100
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn((2, 1, block_size, 64), generator=generator).to(device)
    cache[1] = math.nan
    query = torch.randn((1, 1, 64), generator=generator).to(device)
    plan = DecodeAttentionPlan(
        max_num_seqs=1,
        num_query_heads=1,
        num_kv_heads=1,
        head_size=64,
        block_size=block_size,
        query_dtype=query.dtype,
        kv_cache_dtype=cache.dtype,
        device=device,
        sliding_window=window,
    )
    steps = (torch.tensor([0, 1]).int(), torch.tensor([tokens]).int())
    plan_decode_attention(plan, *steps)
    table = torch.zeros((1, -(-tokens // block_size)), dtype=torch.int32, device=device)
    out, lse = paged_decode_attention(
        query, cache, cache, plan, block_table=table, softmax_scale=0.1
    )
    seen = torch.arange(tokens - window, tokens, device=device) % block_size
    scores = 0.1 * cache[0, 0, seen] @ query[0, 0]
    expected = scores.softmax(0) @ cache[0, 0, seen]
    torch.testing.assert_close(out[0, 0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0, 0], scores.logsumexp(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_slots", [1, 32])
@pytest.mark.parametrize("tokens", [1, 17, 63, 64, 65, 200])
def test_paged_decode_attention_of_nan_looks_poisoned(
    device: torch.device, tokens: int, num_slots: int
) -> None:
    case = DecodeCase("nan", (40, tokens, 70), heads=(4, 2), num_slots=num_slots)
    problem = build_problem(case, device)
    clean, clean_lse = problem.run()
    first = int(problem.block_table[1, 0])
    problem.key_cache[first, 0, 0, 3] = math.nan
    query = problem.query.clone()
    for poisoned in ("key", "query"):
        out, lse = problem.run()
        assert out[1, :2].isnan().all(), poisoned
        assert lse[1, :2].isnan().all(), poisoned
        for now, before in ((out, clean), (lse, clean_lse)):
            assert torch.equal(now[1, 2:], before[1, 2:]), poisoned
            assert torch.equal(now[[0, 2]], before[[0, 2]]), poisoned
        problem.key_cache[first, 0, 0, 3] = 0.0
        query[1, :2, 3] = math.nan
        problem.query = query


def test_paged_decode_attention_without_requests_does_nothing(
    device: torch.device,
) -> None:
    problem = build_problem(DecodeCase("empty", (16,)), device)
    nothing = torch.zeros(0, dtype=torch.int32)
    plan_decode_attention(problem.plan, torch.zeros(1, dtype=torch.int32), nothing)
    out, _ = problem.run()
    assert out.isnan().all()


def test_paged_decode_attention_refuses_what_the_plan_is_not_for(
    device: torch.device,
) -> None:
    problem = build_problem(DecodeCase("plain", (16,)), device)
    table = problem.block_table
    for change, message in (
        ({"query": problem.query.half()}, "query is .* the plan was made for"),
        ({"key_cache": problem.key_cache[:, :1]}, "key_cache is .* made for"),
        ({"block_table": table.long()}, "block_table is .* int32"),
        ({"block_table": table[:, :0]}, "the step needs int32 of at least"),
        ({"block_positions": table}, "block_positions without num_blocks"),
        ({"k_scale": torch.ones(1)}, "Pass both with a torch.float8_e4m3fn cache"),
    ):
        arguments = {
            "query": problem.query,
            "key_cache": problem.key_cache,
            "value_cache": problem.value_cache,
            "plan": problem.plan,
            "block_table": table,
            "softmax_scale": 1.0,
            **change,
        }
        with pytest.raises(ValueError, match=message):
            paged_decode_attention(**arguments)


def test_find_errors_sees_a_wrong_answer(device: torch.device) -> None:
    problem = build_problem(replace(CASES[0], seq_lens=(17,)), device)
    problem.clean_key_cache = problem.clean_key_cache * 1.001
    assert len(find_errors(problem)) == 2
