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
import gc, json, os, sys
import vllm
import vllm_attn_offload
options = json.loads(sys.argv[2])
offload = {"kv_cache_gib": 0.1}

def left(when):
    ours = ("ATTN_OFFLOAD_", "GOMP_", "VLLM_CPU_NUM_OF_RESERVED", "VLLM_CPU_OMP_")
    print(when, [name for name in os.environ if name.startswith(ours)])

def generate(llm):
    prompt = {"prompt_token_ids": [3, 4, 5]}
    params = vllm.SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False)
    reply = llm.generate([prompt], params, use_tqdm=False)[0]
    print(len(reply.outputs[0].token_ids), "tokens")

llm = vllm_attn_offload.LLM(sys.argv[1], attention_offload_config=offload, **options)
left("started")
generate(llm)
del llm
gc.collect()
left("ended")

offload = {"attention_offload": offload}
llm = vllm.LLM(sys.argv[1], additional_config=offload, **options)
generate(llm)
del llm
gc.collect()
left("stock class ended")
"""


@pytest.mark.parametrize("multiprocessing", ["0", "1"])
def test_nothing_is_left_in_the_environment(
    tiny_model: str, multiprocessing: str
) -> None:
    """Else the next engine of the process lost half of its cores.

    vLLM's own class, which starts an offloaded engine as well, does not tell us when it
    is started: it leaves nothing once it is gone.
    """
    options = tiny_llama.engine_options() | {"skip_tokenizer_init": True}
    variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing}
    # The worker's CPUs are then ours to choose; some workers of pytest-xdist are bound.
    variables.pop("VLLM_CPU_OMP_THREADS_BIND", None)
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_model, json.dumps(options)],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    lines = process.stdout.splitlines()
    for when in ("started", "ended", "stock class ended"):
        assert f"{when} []" in lines
    assert lines.count("5 tokens") == 2
