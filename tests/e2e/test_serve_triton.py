# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with attention in the Triton kernels of a memory node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import tiny_llama
from harness.serve_process import ServeProcess
from node_process import running_node

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def triton_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a node that runs the kernels in Triton's interpreter."""
    options = ("--device", "cpu", "--attention-kernel", "triton")
    directory = tmp_path_factory.mktemp("triton-node")
    with running_node(directory, *options, "--kv-cache-gib", "0.1") as node:
        yield node.address
    assert "Traceback" not in node.log()


def test_serve_from_triton_node_is_identical(
    tiny_model: str, tiny_tokens: list[list[int]], triton_node: str, tmp_path: Path
) -> None:
    """Greedy tokens in fp32 equal stock vLLM's; prompts fill one to three blocks."""
    running = ServeProcess(
        tiny_model,
        tmp_path / "serve.log",
        *("--attention-offload", "--enforce-eager", "--dtype", "float32"),
        *("--attention-offload-config.memory_nodes", json.dumps([triton_node])),
        *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--max-num-seqs", "4"),
        *("--block-size", str(tiny_llama.BLOCK_SIZE)),
    )
    try:
        choices = running.complete(tiny_llama.PROMPTS, tiny_llama.NUM_TOKENS)
        assert [choice["token_ids"] for choice in choices] == tiny_tokens
        assert "triton kernel) holds" in running.log.read_text("utf-8")
    finally:
        running.kill_all()
