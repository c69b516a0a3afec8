# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with the plugin from its wheel and nothing of this checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import tiny_llama
from harness.serve_process import VLLM, ServeProcess
from wheel_environment import install_wheel_beside_vllm

pytestmark = pytest.mark.long


def libraries(pid: int) -> set[str]:
    """Files of the compiled library that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if line.endswith("/_native.lib.so")}


def test_serve_from_the_wheel(
    dist: Path,
    tiny_model: str,
    tiny_tokens: list[list[int]],
    node_cpu: str,
    tmp_path: Path,
) -> None:
    """Tokens are stock's; engine and local node run the wheel's compiled library."""
    commands = install_wheel_beside_vllm(tmp_path / "environment", dist)
    running = ServeProcess(
        tiny_model,
        tmp_path / "serve.log",
        *("--attention-offload", "--enforce-eager", "--dtype", "float32"),
        *("--attention-offload-config.kv_cache_gib", "0.01"),
        *("--attention-offload-config.local_node_cpus", node_cpu),
        *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--max-num-seqs", "4"),
        *("--block-size", str(tiny_llama.BLOCK_SIZE)),
        command=(commands / "python", VLLM),
    )
    try:
        choices = running.complete(tiny_llama.PROMPTS, tiny_llama.NUM_TOKENS)
        assert [choice["token_ids"] for choice in choices] == tiny_tokens
        pids = [running.memory_node().pid, *(each.pid for each in running.children)]
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        package = f"lib/{version}/site-packages/vllm_attn_offload"
        library = tmp_path / "environment" / package / "native/_native.lib.so"
        assert libraries(pids[0]) == {str(library)}
        assert set().union(*map(libraries, pids)) == {str(library)}
    finally:
        running.kill_all()
