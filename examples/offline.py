# SPDX-License-Identifier: Apache-2.0
"""Generates offline; a memory node is started on this host and ends with the script.

python examples/offline.py HuggingFaceTB/SmolLM2-135M-Instruct
"""

import sys

from vllm_attn_offload import LLM

PROMPTS = ["The capital of France is", "Water boils at"]

if __name__ == "__main__":  # vLLM starts processes that import this file
    llm = LLM(
        model=sys.argv[1],
        attention_offload_config={"kv_cache_gib": 1},
        max_model_len=1024,
        enforce_eager=True,
    )
    for request in llm.generate(PROMPTS):
        sys.stdout.write(f"{request.prompt}{request.outputs[0].text}\n")
