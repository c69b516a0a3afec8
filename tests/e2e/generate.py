# SPDX-License-Identifier: Apache-2.0
"""Runs the workload through ``LLM()`` in a process of its own; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# This script is started by path: only its own folder is found.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import adapters
import sharing
import workload

Completion = dict[str, Any]


def main() -> None:
    """``generate.py MODEL DTYPE MODE OUTPUT [ADDRESS ...]``."""
    model, dtype, mode, output, *addresses = sys.argv[1:]
    longest = workload.MODES[mode].longest
    first, second = (
        [prompt for prompt in prompts if len(prompt) <= longest]
        for prompts in workload.prompts(model, dtype)
    )
    llm = _engine(model, dtype, workload.MODES[mode], addresses)
    result = {
        "lengths": [len(prompt) for prompt in (*first, *second)],
        "greedy": [*_greedy(llm, first), *_greedy(llm, second)],
        "several": _several(llm, first[10:12]),
        "metrics": _metrics(llm),
    }
    if rounds := workload.MODES[mode].sharing_rounds:
        phrases = workload.phrases(model)
        result["together"] = sharing.arrive_together(llm, phrases, rounds)
        result["joined"] = sharing.join_writer(llm, phrases)
    if workload.MODES[mode].uses_adapters and dtype == "float32":
        result["adapted"] = adapters.generate(llm, workload.phrases(model))
    if mode != "stock":
        result["stub_bytes"] = llm.collective_rpc("kv_stub_bytes")
        result["times"] = llm.collective_rpc("exchange_times")
    with open(output, "w", encoding="utf-8") as file:
        json.dump(result, file)


def _engine(model: str, dtype: str, mode: workload.Mode, addresses: list[str]) -> Any:
    from vllm_attn_offload import LLM

    options = {
        **workload.ENGINE_OPTIONS,
        "dtype": dtype,
        "disable_log_stats": False,
        **mode.engine,
    }
    if mode.uses_adapters and dtype == "float32":
        options |= adapters.ENGINE_OPTIONS
    pool = workload.pool_gib(dtype)
    if mode.offload is None:
        return LLM(model, kv_cache_memory_bytes=int(pool * (1 << 30)), **options)
    offload = {"kv_cache_gib": pool, "memory_nodes": addresses, **mode.offload}
    return LLM(
        model, attention_offload=True, attention_offload_config=offload, **options
    )


def _greedy(llm: Any, prompts: list[list[int]]) -> list[Completion]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=workload.NUM_TOKENS, ignore_eos=True, logprobs=2
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    return [_completion(output.outputs[0]) for output in outputs]


def _several(llm: Any, prompts: list[list[int]]) -> list[Completion]:
    from vllm import SamplingParams

    params = SamplingParams(
        # top_k=1: several answers, yet none depends on who drew random numbers first.
        n=3,
        temperature=0.8,
        top_k=1,
        max_tokens=16,
        ignore_eos=True,
        logprobs=2,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    return [_completion(choice) for output in outputs for choice in output.outputs]


def _completion(output: Any) -> Completion:
    """Tokens, their log-probabilities, and the gap between the two best at each."""
    tokens = list(output.token_ids)
    ranked = [
        sorted((entry.logprob for entry in step.values()), reverse=True)
        for step in output.logprobs
    ]
    return {
        "tokens": tokens,
        "logprobs": [
            step[token].logprob
            for step, token in zip(output.logprobs, tokens, strict=True)
        ],
        "gaps": [best[0] - best[1] for best in ranked],
    }


def _metrics(llm: Any) -> dict[str, float]:
    wanted = ("vllm:num_preemptions", "vllm:prefix_cache_hits")
    return {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if metric.name in wanted
    }


if __name__ == "__main__":
    main()
