# SPDX-License-Identifier: Apache-2.0
"""An offloaded ``LLM`` leaves the environment of its process as stock vLLM does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from harness import tiny_llama

pytestmark = pytest.mark.long

SCRIPT = """
import json, os, sys
from vllm_attn_offload import LLM
options = json.loads(sys.argv[2])
llm = LLM(sys.argv[1], attention_offload_config={"kv_cache_gib": 0.1}, **options)
left = [name for name in os.environ if name.startswith("ATTN_OFFLOAD_")]
print(json.dumps([*left, os.environ.get("VLLM_CPU_NUM_OF_RESERVED_CPU")]))
from vllm import SamplingParams
prompt = {"prompt_token_ids": [3, 4, 5]}
params = SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False)
print(len(llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids))
"""


@pytest.mark.parametrize("multiprocessing", ["0", "1"])
def test_nothing_is_left_in_the_environment(
    tiny_model: str, multiprocessing: str
) -> None:
    """Else the next engine of the process lost half of its cores."""
    options = tiny_llama.engine_options() | {"skip_tokenizer_init": True}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_model, json.dumps(options)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    lines = process.stdout.splitlines()
    assert "[null]" in lines
    assert "5" in lines
