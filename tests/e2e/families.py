# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of tiny models of many families, stock and offloaded.

A process of its own that runs one engine after another, because importing vLLM takes
longer than most of them.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

NUM_TOKENS = 24
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "skip_tokenizer_init": True,
    "trust_remote_code": True,
    "disable_log_stats": False,
}
#: Of all models, as stock vLLM gets it.
POOL_BYTES = 16 << 20
#: A decode step of the first requests.
KILL_AFTER_STEPS = 12
#: Of the two Mamba-2 layers: 3 x 288 numbers before the convolution, and 8 x 32 x 16.
NEMOTRON_H_STATE_BYTES = 2 * 4 * (3 * 288 + 8 * 32 * 16)
#: Of a model, also for stock vLLM. On CPUs vLLM's Mamba-2 layers keep no state within a
#: prompt, which its prefix caching asks them for, and its linear attention is for bf16.
MODELS: dict[str, dict[str, Any]] = {
    "nemotron_h": {"enable_prefix_caching": False},
    "falcon_h1": {"enable_prefix_caching": False},
    "granitemoehybrid": {"enable_prefix_caching": False},
    "qwen3_next": {"dtype": "bfloat16"},
}
#: ``nodes`` are external ones, poisoned; 0: the engine starts its own.
CASES: dict[str, dict[str, Any]] = {
    "phi3": {"model": "phi3", "nodes": 1},
    "gpt_oss": {"model": "gpt_oss", "nodes": 1},
    "gpt_oss without HMA": {
        "model": "gpt_oss",
        "nodes": 2,
        "engine": {"disable_hybrid_kv_cache_manager": True},
        "offload": {"partition": "heads"},
    },
    "gemma2": {"model": "gemma2", "nodes": 1, "engine": {"max_num_batched_tokens": 16}},
    "gemma3 in a small pool": {
        "model": "gemma3",
        "nodes": 1,
        "pool_blocks": 32,
        # All prompts at once, which grow beyond the blocks that there are.
        "engine": {"max_num_seqs": 6},
    },
    "gemma3": {
        "model": "gemma3",
        "nodes": 3,
        "offload": {"partition": "blocks"},
        "engine": {"max_num_batched_tokens": 16},
    },
    "gemma3 loses its node": {"model": "gemma3", "nodes": 0, "kill": True},
    "gemma4": {"model": "gemma4", "nodes": 1, "offload": {"num_microbatches": 2}},
    "gemma4 with shared KV": {
        "model": "gemma4-shared",
        "nodes": 2,
        "offload": {"partition": "blocks"},
        "engine": {"max_num_batched_tokens": 7},
    },
    "mistral": {
        "model": "mistral",
        "nodes": 2,
        "offload": {"partition": "heads"},
        "engine": {"max_num_batched_tokens": 7},
    },
    "laguna on two ranks": {
        "model": "laguna",
        "nodes": 1,
        "engine": {"tensor_parallel_size": 2},
        "variables": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    },
    "lfm2": {"model": "lfm2", "nodes": 1},
    "lfm2_moe": {"model": "lfm2_moe", "nodes": 1},
    "nemotron_h": {
        "model": "nemotron_h",
        "nodes": 2,
        "offload": {"partition": "heads"},
        "engine": {"max_num_batched_tokens": 40},
    },
    "nemotron_h in a small pool": {
        "model": "nemotron_h",
        "nodes": 1,
        # Half as many of its own, which hold 64 tokens.
        "pool_blocks": 16,
        "engine": {"max_num_seqs": 6, "max_model_len": 320},
    },
    "nemotron_h with few states": {
        "model": "nemotron_h",
        "nodes": 1,
        # Of two requests, and the one that vLLM keeps empty.
        "offload": {"resident_state_gib": 3 * NEMOTRON_H_STATE_BYTES / (1 << 30)},
    },
    "nemotron_h loses its node": {"model": "nemotron_h", "nodes": 0, "kill": True},
    "nemotron_h on two ranks": {
        "model": "nemotron_h",
        "nodes": 1,
        "engine": {"tensor_parallel_size": 2},
        "variables": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    },
    "falcon_h1": {
        "model": "falcon_h1",
        "nodes": 2,
        "offload": {"partition": "blocks"},
    },
    "granitemoehybrid": {"model": "granitemoehybrid", "nodes": 1},
    "qwen3_next": {"model": "qwen3_next", "nodes": 1},
    "qwen3_next loses its node": {"model": "qwen3_next", "nodes": 0, "kill": True},
    "bloom": {"model": "bloom", "nodes": 2, "offload": {"partition": "heads"}},
    "llama4": {"model": "llama4", "nodes": 2, "offload": {"partition": "blocks"}},
    "decilm": {"model": "decilm", "nodes": 2, "offload": {"partition": "blocks"}},
}


def prompts() -> tuple[list[list[int]], list[list[int]]]:
    """Of one row to more than six windows; then two that begin like the longest."""
    draw = random.Random(0)
    lengths = (1, 45, 85, 150, 260)
    first = [[draw.randrange(3, 500) for _ in range(length)] for length in lengths]
    return first, [[*first[3], 7, 8, 9], [*first[4][:200], 11]]


def main() -> None:
    """``families.py MODELS OUTPUT [ADDRESS ...]``: stock, or every case with nodes."""
    models, output, *addresses = sys.argv[1:]
    cases = CASES
    if not addresses:
        cases = {case["model"]: {"model": case["model"]} for case in CASES.values()}
    results = {}
    for name, case in cases.items():
        started = time.perf_counter()
        os.environ.update(case.get("variables", {}))
        results[name] = run(str(Path(models, case["model"])), case, addresses)
        for variable in case.get("variables", {}):
            del os.environ[variable]
        sys.stderr.write(f"{name}: {time.perf_counter() - started:.1f} s\n")
    Path(output).write_text(json.dumps(results), "utf-8")


def run(model: str, case: dict[str, Any], addresses: list[str]) -> dict[str, Any]:
    """Results of one engine."""
    from vllm_attn_offload import LLM

    load_class(model)
    options = ENGINE | MODELS.get(case["model"], {}) | case.get("engine", {})
    llm: Any = LLM(model, **(options | memory(case, addresses)))
    first, second = prompts()
    kill = kill_memory_node if case.get("kill") else None
    outputs = generate(llm, first, kill=kill)
    outputs += generate(llm, second)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    cache = llm.llm_engine.vllm_config.cache_config
    result = {
        "num_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "hits": metrics["vllm:prefix_cache_hits"].value,
        "preemptions": metrics["vllm:num_preemptions"].value,
        **{part: [each[part] for each in outputs] for part in outputs[0]},
    }
    if addresses:
        result["times"] = llm.collective_rpc("exchange_times")
        result["stub_bytes"] = llm.collective_rpc("kv_stub_bytes")
        result["state_bytes"] = llm.collective_rpc("resident_state_bytes")
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return result


def memory(case: dict[str, Any], addresses: list[str]) -> dict[str, Any]:
    """Options of the pool."""
    if not addresses:
        return {"kv_cache_memory_bytes": POOL_BYTES}
    num_nodes = case["nodes"]
    num_bytes = POOL_BYTES / max(1, num_nodes)
    if "pool_blocks" in case:
        # Of two layers, keys and values of 32 tokens and 2 heads of 32 in fp32.
        num_bytes = case["pool_blocks"] * 2 * 2 * 32 * 2 * 32 * 4
    options = {"kv_cache_gib": num_bytes / (1 << 30), **case.get("offload", {})}
    if num_nodes:
        options["memory_nodes"] = addresses[:num_nodes]
    return {"attention_offload": True, "attention_offload_config": options}


def load_class(model: str) -> None:
    """Make vLLM look at the class here, and not in a process that takes long."""
    from vllm import ModelRegistry

    (name,) = json.loads(Path(model, "config.json").read_text())["architectures"]
    ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def generate(
    llm: Any,
    token_ids: list[list[int]],
    *,
    num_tokens: int = NUM_TOKENS,
    kill: Callable[[], object] | None = None,
) -> list[dict[str, list[Any]]]:
    """Tokens, their log-probabilities, and how far the best is from the second."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=num_tokens,
        ignore_eos=True,
        logprobs=2,
        detokenize=False,
    )
    engine, done = llm.llm_engine, {}
    for index, tokens in enumerate(token_ids):
        engine.add_request(str(index), {"prompt_token_ids": tokens}, params)
    num_steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = output.outputs[0]
        num_steps += 1
        if kill is not None and num_steps == KILL_AFTER_STEPS:
            kill()
    return [_completion(answer) for _, answer in sorted(done.items())]


def _completion(answer: Any) -> dict[str, list[Any]]:
    steps = [
        sorted((each.logprob for each in step.values()), reverse=True)
        for step in answer.logprobs
    ]
    return {
        "tokens": list(answer.token_ids),
        "logprobs": [best for best, *_ in steps],
        "gaps": [best - second for best, second, *_ in steps],
    }


def kill_memory_node() -> None:
    """Kill the node that this process's engine started."""
    memory_node().kill()


def memory_node() -> psutil.Process:
    """The node that this process's engine started."""
    nodes = [
        process
        for process in psutil.Process().children(recursive=True)
        if any("memory_node" in part for part in process.cmdline())
    ]
    assert len(nodes) == 1, [process.cmdline() for process in nodes]
    return nodes[0]


if __name__ == "__main__":
    main()
