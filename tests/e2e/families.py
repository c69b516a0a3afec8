# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of tiny models of many families, stock or offloaded, in one process."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

NUM_TOKENS = 24
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "skip_tokenizer_init": True,
}


def prompts() -> list[list[int]]:
    """Of one row, one block and a row, more than three windows; then prefix hits."""
    import random

    draw = random.Random(0)
    lengths = (1, 33, 70, 150, 260)
    first = [[draw.randrange(3, 500) for _ in range(length)] for length in lengths]
    return [*first, first[3] + [7, 8, 9], first[4][:200] + [11]]


def main() -> None:
    """``families.py MODE OUTPUT MODEL ...``; a mode is JSON: options and offloading."""
    mode, output, *models = sys.argv[1:]
    options = json.loads(mode)
    results = {}
    for model in models:
        started = time.perf_counter()
        try:
            results[Path(model).name] = run(model, options)
        except Exception as error:
            results[Path(model).name] = {"error": f"{type(error).__name__}: {error}"}
        sys.stderr.write(f"{model} {time.perf_counter() - started:.1f} s\n")
    Path(output).write_text(json.dumps(results), "utf-8")


def run(model: str, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    from vllm_attn_offload import LLM

    load_class(model)
    llm: Any = LLM(model, **(ENGINE | options))
    params = SamplingParams(
        temperature=0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        logprobs=2,
        detokenize=False,
    )
    tokens = [{"prompt_token_ids": prompt} for prompt in prompts()]
    outputs = llm.generate(tokens[:5], params, use_tqdm=False)
    outputs += llm.generate(tokens[5:], params, use_tqdm=False)
    config = llm.llm_engine.vllm_config.cache_config
    result = {
        "num_blocks": config.num_gpu_blocks,
        "tokens": [list(each.outputs[0].token_ids) for each in outputs],
        "logprobs": [
            [
                step[token].logprob
                for step, token in zip(o.logprobs, o.token_ids, strict=True)
            ]
            for o in (each.outputs[0] for each in outputs)
        ],
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return result


def load_class(model: str) -> None:
    """Make vLLM look at the class here, and not in a process that takes long."""
    from vllm import ModelRegistry

    (name,) = json.loads(Path(model, "config.json").read_text())["architectures"]
    ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


if __name__ == "__main__":
    main()
