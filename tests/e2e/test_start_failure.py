# SPDX-License-Identifier: Apache-2.0
"""What only the layers of a loaded model show is the last that ``vllm serve`` says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from harness import tiny_llama
from harness.processes import free_port
from harness.serve_process import VLLM

pytestmark = pytest.mark.long

#: A model that its author has added to vLLM: one layer more, with other heads.
MODEL = """
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM


class OddLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.odd = Attention(
            4, 32, 1.0, num_kv_heads=2, head_size_v=16,
            cache_config=vllm_config.cache_config, prefix="odd.attn",
        )


def register():
    from vllm import ModelRegistry

    ModelRegistry.register_model(
        "LlamaForCausalLM", "odd_llama:OddLlamaForCausalLM"
    )
"""
ENTRY_POINTS = "[vllm.general_plugins]\nodd_llama = odd_llama:register\n"
METADATA = "Metadata-Version: 2.1\nName: odd-llama\nVersion: 1\n"
REFUSAL = (
    "Attention offloading does not support 1 layer(s) of this model: odd.attn (values "
    "of size 16, keys of 32). Allowed: causal decoder attention by vLLM's own layer, "
    "with values as long as keys. Run this model without --attention-offload."
)


def install(directory: Path) -> None:
    (directory / "odd_llama.py").write_text(MODEL)
    info = directory / "odd_llama-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)


def test_refusal_of_a_worker_is_the_last_line(tiny_model: str, tmp_path: Path) -> None:
    """After the tracebacks of worker and engine, which vLLM logs anyway."""
    install(tmp_path)
    options = tiny_llama.engine_options()
    server = subprocess.run(
        [
            *(VLLM, "serve", tiny_model, "--port", str(free_port())),
            *("--attention-offload", "--enforce-eager", "--dtype", "float32"),
            *("--max-model-len", str(options["max_model_len"])),
            *("--attention-offload-config.kv_cache_gib", "0.1"),
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert server.returncode != 0
    assert "WorkerProc initialization failed" in server.stdout
    *_, last = (line for line in server.stdout.splitlines() if "ERROR" in line)
    assert last.endswith(REFUSAL), server.stdout[-4000:]
    _, _, after = server.stdout.partition("Engine core initialization failed")
    assert after.count(REFUSAL) == 1
