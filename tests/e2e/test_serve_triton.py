# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with attention in the Triton kernels of a memory node."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from serve import ServeProcess

NODE = Path(sys.executable).with_name("vllm-memory-node")


@pytest.fixture(scope="module")
def tiny_llama(root: Path) -> ModuleType:
    """The script that makes the model and runs it through ``LLM()``."""
    path = root / "benchmarks" / "tiny_llama.py"
    spec = importlib.util.spec_from_file_location("tiny_llama", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_model(
    tiny_llama: ModuleType, smollm2: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Random weights with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tiny_llama.save(directory, vocab_size=len(tokenizer))
    for file in Path(smollm2).glob("*token*"):
        shutil.copy(file, directory)
    return str(directory)


@pytest.fixture(scope="module")
def triton_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a node that runs the kernels in Triton's interpreter."""
    directory = tmp_path_factory.mktemp("triton-node")
    address = f"unix:{directory / 'node.sock'}"
    options = ("--device", "cpu", "--attention-kernel", "triton")
    with (directory / "node.log").open("wb") as log:
        process = subprocess.Popen(
            [NODE, "--listen", address, *options, "--kv-cache-gib", "0.1"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield address
    process.kill()
    process.wait()
    assert "Traceback" not in (directory / "node.log").read_text("utf-8")


def test_serve_from_triton_node_is_identical(
    tiny_llama: ModuleType, tiny_model: str, triton_node: str, tmp_path: Path
) -> None:
    """Greedy tokens in fp32 equal stock vLLM's; prompts fill one to three blocks."""
    output = tmp_path / "stock.json"
    command = [sys.executable, str(tiny_llama.__file__), tiny_model, str(output)]
    stock = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert stock.returncode == 0, stock.stderr[-4000:] + stock.stdout[-4000:]
    expected = json.loads(output.read_text("utf-8"))["tokens"]
    assert len({token for tokens in expected for token in tokens}) > 12

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
        assert [choice["token_ids"] for choice in choices] == expected
        assert "triton kernel) holds" in running.log.read_text("utf-8")
    finally:
        running.kill_all()
