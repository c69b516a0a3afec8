# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` without patches: the one engine of ``make test-quick``."""

from __future__ import annotations

import psutil
import pytest
from harness.serve_process import ServeProcess

from vllm_attn_offload.engine.args import CPU_WORKER_CLS
from vllm_attn_offload.engine.executor_choice import EXECUTOR_CLS


def test_serve_without_patches_dies_with_its_memory_node(
    smollm2: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The README's patch-free command line; a lost KV cache ends it with a sentence."""
    log = tmp_path_factory.mktemp("lost") / "serve.log"
    running = ServeProcess(
        smollm2,
        log,
        *("--distributed-executor-backend", EXECUTOR_CLS),
        *("--worker-cls", CPU_WORKER_CLS),
        "--additional-config",
        '{"attention_offload": {"kv_cache_gib": 0.5, "on_node_loss": "fail"}}',
        *("--enforce-eager", "--max-model-len", "512", "--load-format", "dummy"),
        VLLM_PLUGINS="",
    )
    try:
        (answer,) = running.complete([[1, 2, 3]], 2)
        assert len(answer["token_ids"]) == 2
        running.memory_node().kill()
        running.process.wait(30)
        assert "The engine stops, because its KV cache is lost" in log.read_text(
            "utf-8"
        )
        _, alive = psutil.wait_procs(running.children, timeout=30)
        assert alive == []
    finally:
        running.kill_all()
