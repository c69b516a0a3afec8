# SPDX-License-Identifier: Apache-2.0
"""Tokens and logits over a KV cache of fp8, stock and offloaded, in one process."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import families

VOCAB_SIZE = 512
NUM_TOKENS = 12
#: One shape of engine; prompts are as long as 260 tokens.
ENGINE = families.ENGINE | {
    "kv_cache_dtype": "fp8",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "max_logprobs": VOCAB_SIZE,
}
BF16 = {"dtype": "bfloat16"}
#: ``nodes`` share the KV heads or the blocks; 0: stock vLLM.
CASES: dict[str, dict[str, Any]] = {
    "whole": {"nodes": 1, "again": True},
    "chunks": {
        "nodes": 2,
        "engine": {"max_num_batched_tokens": 16},
        "offload": {"partition": "blocks"},
        "distribution": True,
    },
    "stock": {"nodes": 0, "distribution": True},
    "bf16": {"nodes": 1, "engine": BF16, "distribution": True},
    "bf16 in chunks": {
        "nodes": 2,
        "engine": BF16 | {"max_num_batched_tokens": 40},
        "offload": {"partition": "heads"},
    },
    "stock bf16": {"nodes": 0, "engine": BF16, "distribution": True},
    # Stock starts in a fifth of the time; its pool has as many bytes.
    "unquantised bf16": {
        "nodes": 0,
        "engine": BF16 | {"kv_cache_dtype": "auto"},
        "distribution": True,
    },
    "scales": {
        "model": "scales",
        "nodes": 1,
        "engine": {"max_num_batched_tokens": 40},
        "distribution": True,
    },
}
#: The checkpoint says so itself.
OF_CHECKPOINT = {"scales": {"kv_cache_dtype": "auto"}}


def main() -> None:
    """``fp8_cases.py MODELS OUTPUT ADDRESS ADDRESS``: every case, one after another."""
    models, output, *addresses = sys.argv[1:]
    results = {}
    for name, case in CASES.items():
        started = time.perf_counter()
        results[name] = run(models, case, addresses)
        sys.stderr.write(f"{name}: {time.perf_counter() - started:.1f} s\n")
    Path(output).write_text(json.dumps(results), "utf-8")


def run(models: str, case: dict[str, Any], addresses: list[str]) -> dict[str, Any]:
    """Results of one engine; of stock vLLM where this CPU cannot: why."""
    from vllm_attn_offload import LLM

    model = case.get("model", "plain")
    path = str(Path(models, model))
    families.load_class(path)
    options = ENGINE | OF_CHECKPOINT.get(model, {}) | case.get("engine", {})
    options |= families.memory(case, addresses if case["nodes"] else [])
    try:
        llm: Any = LLM(path, **options)
    except NotImplementedError as error:
        if case["nodes"]:
            raise
        return {"refused": str(error)}
    first, second = families.prompts()
    outputs, again = generate(llm, first), []
    outputs += generate(llm, second)
    if case.get("again"):
        again = generate(llm, first)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    cache = llm.llm_engine.vllm_config.cache_config
    result = {
        "again": again,
        "pool_tokens": cache.num_gpu_blocks * cache.block_size,
        "hits": metrics["vllm:prefix_cache_hits"].value,
        **{part: [each[part] for each in outputs] for part in outputs[0]},
    }
    if case.get("distribution"):
        result["distribution"] = distribution(llm, first[-1])
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return result


def generate(llm: Any, prompts: list[list[int]]) -> list[dict[str, list[Any]]]:
    return families.generate(llm, prompts, num_tokens=NUM_TOKENS)


def distribution(llm: Any, prompt: list[int]) -> list[list[float]]:
    """Log-probabilities ``[len(prompt) - 1, VOCAB_SIZE]`` of the next token."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1, prompt_logprobs=VOCAB_SIZE, detokenize=False, temperature=0
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return [
        [entry[token].logprob for token in range(VOCAB_SIZE)]
        for entry in output.prompt_logprobs[1:]
    ]


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main()
