# SPDX-License-Identifier: Apache-2.0
"""What vLLM computes while it warms up stays on the compute node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import tiny_llama
from transformers import LlamaForCausalLM
from vllm.config.multimodal import MultiModalConfig
from vllm.multimodal.gpu_ipc_memory import reserve_mm_ipc_gpu_memory

from vllm_attn_offload.worker.base import UNUSED_KV_CACHE_BYTES

HELPERS = Path(__file__).parents[1] / "helpers"
PROMPT = list(range(200, 240))
SCRIPT = """
import json, sys
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

options = json.loads(sys.argv[2])
config = EngineArgs(sys.argv[1], **options).create_engine_config()
config.parallel_config.worker_cls = "warming_worker.WarmingWorker"
engine = LLMEngine.from_vllm_config(config)
(report,) = engine.collective_rpc("warm_up_report")
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
engine.add_request("0", {"prompt_token_ids": json.loads(sys.argv[3])}, params)
while engine.has_unfinished_requests():
    outputs = engine.step()
(times,) = engine.collective_rpc("exchange_times")
tokens = list(outputs[0].outputs[0].token_ids)
print(json.dumps({"report": report, "tokens": tokens, "times": times}))
"""


@pytest.mark.long
def test_warm_up_reaches_no_node(tmp_path: Path) -> None:
    """Dummy requests run through the model; what follows is attended as ever."""
    tiny_llama.save(tmp_path)
    options = tiny_llama.engine_options() | {
        "skip_tokenizer_init": True,
        "additional_config": {"attention_offload": {"kv_cache_gib": 0.01}},
    }
    engine = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)]
        + [json.dumps(options), json.dumps(PROMPT)],
        env=os.environ
        | {"PYTHONPATH": str(HELPERS), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert engine.returncode == 0, engine.stderr[-3000:]
    (line,) = [each for each in engine.stdout.splitlines() if each.startswith("{")]
    found = json.loads(line)
    report, times = found["report"], found["times"]
    assert report.pop("req_ids") == ["warm-up"]
    assert set(report.values()) == {0.0}
    assert times["num_layer_calls"] >= 2 * 8
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rows = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)
    assert found["tokens"] == rows[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("video", [{}, {"backend": "pynvvideocodec", "hw_decoders": 4}])
def test_frontends_decode_beside_no_kv_cache(video: dict[str, object]) -> None:
    """vLLM takes what frontends decode in from the size that is never used."""
    config = MultiModalConfig(
        mm_ipc_gpu_memory_gb=16.0, media_io_kwargs={"video": video}
    )
    left = reserve_mm_ipc_gpu_memory(UNUSED_KV_CACHE_BYTES, config, 8)
    assert left > UNUSED_KV_CACHE_BYTES // 2
    with pytest.raises(ValueError, match="GPU decoding reserves"):
        reserve_mm_ipc_gpu_memory(1, config, 8)
