# SPDX-License-Identifier: Apache-2.0
"""A 2-layer Llama with random weights, and its greedy tokens from vLLM as JSON.

Needs nothing downloaded; small enough for attention in Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

NUM_TOKENS = 8
#: The smallest of vLLM's CPU attention, so that prompts fill several.
BLOCK_SIZE = 32
MAX_MODEL_LEN = 256
# One row, one block and a row, three blocks; the kernels take 16 rows at once.
PROMPTS = [[11], list(range(100, 133)), list(range(900, 970))]


def save(directory: Path, vocab_size: int = 1024) -> None:
    """Write config and seeded weights; the tokenizer, if any, is the caller's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        # Large, so that tokens depend on what attention returns.
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def engine_options() -> dict[str, Any]:
    """Options that stock and offloading engines share."""
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 4,
        "block_size": BLOCK_SIZE,
    }


def main() -> None:
    """``tiny_llama.py MODEL OUTPUT [NODE]``: stock, or offloaded to a memory node."""
    model, output, *nodes = sys.argv[1:]
    from vllm import SamplingParams

    options = engine_options() | {"skip_tokenizer_init": True}
    if nodes:
        from vllm_attn_offload import LLM

        llm: Any = LLM(
            model,
            attention_offload=True,
            attention_offload_config={"memory_nodes": nodes, "kv_cache_gib": 0.01},
            **options,
        )
    else:
        import vllm

        llm = vllm.LLM(model, kv_cache_memory_bytes=1 << 24, **options)
    params = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    started = time.perf_counter()
    answers = llm.generate(prompts, params, use_tqdm=False)
    result = {
        "seconds": time.perf_counter() - started,
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
    }
    Path(output).write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
