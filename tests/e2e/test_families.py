# SPDX-License-Identifier: Apache-2.0
"""Model families with windows, caps, sinks, slopes, several KV groups, shared KV."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_families
from node_process import NodeProcess

HERE = Path(__file__).parent
NUM_NODES = 3
TIMEOUT_S = 900
MAX_LOGPROB_DIFFERENCE = 1e-4
#: Different ones that a random model says; one that said one only would prove little.
MIN_TOKENS = 6
SMALL_POOL = "gemma3 in a small pool"

pytestmark = pytest.mark.long
Result = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by family."""
    directory = tmp_path_factory.mktemp("families")
    for family in sorted({case["model"] for case in families.CASES.values()}):
        tiny_families.save(family, directory / family)
    return directory


@pytest.fixture(scope="module")
def stock(models: Path) -> Result:
    """Results of stock vLLM by family."""
    return run(models, [])


@pytest.fixture(scope="module")
def offloaded(models: Path, node_cpu: str) -> Result:
    """Results by case, with nodes whose unwritten blocks hold NaN."""
    with ExitStack() as stack:
        nodes = []
        for index in range(NUM_NODES):
            node = NodeProcess(
                "127.0.0.1:0",
                models / f"node-{index}.log",
                *("--kv-cache-gib", "0.1", "--cpus", node_cpu),
                ATTN_OFFLOAD_POISON_KV="1",
            )
            stack.callback(node.kill)
            nodes.append(node)
        return run(models, [node.address for node in nodes])


def run(models: Path, addresses: list[str]) -> Result:
    output = models / f"result-{len(addresses)}.json"
    child = subprocess.run(
        [sys.executable, str(HERE / "families.py"), str(models), str(output)]
        + addresses,
        env=os.environ
        # In this process: one import of vLLM less per engine.
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "ATTN_OFFLOAD_POISON_KV": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert child.returncode == 0, child.stderr[-4000:] + child.stdout[-4000:]
    return json.loads(output.read_text("utf-8"))


@pytest.mark.parametrize("case", families.CASES)
def test_equals_stock(stock: Result, offloaded: Result, case: str) -> None:
    """Every token, and the log-probabilities within 1e-4."""
    theirs, ours = stock[families.CASES[case]["model"]], offloaded[case]
    assert ours["tokens"] == theirs["tokens"]
    assert len({token for tokens in theirs["tokens"] for token in tokens}) > MIN_TOKENS
    worst = max(
        abs(a - b)
        for mine, other in zip(ours["logprobs"], theirs["logprobs"], strict=True)
        for a, b in zip(mine, other, strict=True)
    )
    assert worst <= MAX_LOGPROB_DIFFERENCE


# A small pool has given the first prompts' blocks to others.
@pytest.mark.parametrize(
    "case", [name for name in families.CASES if name != SMALL_POOL]
)
def test_prefixes_are_hit(offloaded: Result, case: str) -> None:
    """Also where all but the end of a prefix has fallen out of the window."""
    assert offloaded[case]["hits"] > 0


@pytest.mark.parametrize("case", ["phi3", "gpt_oss", "gemma4"])
def test_as_many_blocks_as_stock(stock: Result, offloaded: Result, case: str) -> None:
    """In as many bytes, with the hybrid KV cache manager on."""
    model = families.CASES[case]["model"]
    assert offloaded[case]["num_blocks"] == stock[model]["num_blocks"]


def test_preempted(offloaded: Result) -> None:
    assert offloaded[SMALL_POOL]["preemptions"] > 0


def test_steps_were_cut(offloaded: Result) -> None:
    """Steps of several KV groups run in two micro-batches."""
    (times,) = offloaded["gemma4"]["times"]
    assert times["num_cut_steps"] > 0
