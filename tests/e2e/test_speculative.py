# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: tokens and accepted guesses are stock vLLM's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import speculative_engines
import tiny_families
import tiny_speculative
from families import ENGINE
from node_process import NodeProcess
from speculative_engines import CASES, NUM_DRAFTED, NUM_TOKENS, settings

HERE = Path(__file__).parent
NUM_NODES = 2
TIMEOUT_S = 900
MAX_LOGPROB_DIFFERENCE = 1e-4
#: Different ones that a random model says; one that said one only would prove little.
MIN_TOKENS = 6
COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
SMALL_POOLS = ["ngram of 15 in a small pool", "draft on two ranks"]
#: Recomputing what a lost node held costs drafts that stock does not make.
UNDISTURBED = [name for name in CASES if not settings(name).get("kill")]
#: Share of guesses that are accepted, at least and at most.
ACCEPTANCE = {
    "draft on two ranks": (1.0, 1.0),
    "eagle": (0.3, 0.99),
    "mtp": (0.3, 0.99),
    "ngram of 15 in a small pool": (0.3, 0.99),
    "ngram in two KV groups": (0.3, 0.99),
    "suffix": (0.3, 0.99),
    "eagle3": (0.0, 0.05),
}

pytestmark = pytest.mark.long
Result = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by name."""
    directory = tmp_path_factory.mktemp("speculative")
    cases = map(settings, CASES)
    names = {
        case[part] for case in cases for part in ("model", "draft") if part in case
    }
    for name in sorted(names):
        if name in tiny_speculative.NAMES:
            tiny_speculative.save(name, directory / name)
        else:
            tiny_families.save(name, directory / name)
    return directory


@pytest.fixture(scope="module")
def results(models: Path, node_cpu: str) -> tuple[Result, Result]:
    """Those of stock vLLM and of offloading engines, which run side by side."""
    with ExitStack() as stack:
        others = stack.enter_context(ThreadPoolExecutor(1))
        # On the nodes' CPU, which waits for most of the time.
        theirs = others.submit(run, models, [], VLLM_CPU_OMP_THREADS_BIND=node_cpu)
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
        ours = run(models, [node.address for node in nodes])
        return theirs.result(), ours


@pytest.fixture(scope="module")
def stock(results: tuple[Result, Result]) -> Result:
    """Results of stock vLLM by case, and by model without speculation."""
    return results[0]


@pytest.fixture(scope="module")
def offloaded(results: tuple[Result, Result]) -> Result:
    """Results by case, with nodes whose unwritten blocks hold NaN."""
    return results[1]


def run(models: Path, addresses: list[str], **variables: str) -> Result:
    output = models / f"result-{len(addresses)}.json"
    child = subprocess.run(
        [sys.executable, str(speculative_engines.__file__), str(models), str(output)]
        + addresses,
        env=os.environ
        # In this process: one import of vLLM less per engine.
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "ATTN_OFFLOAD_POISON_KV": "1"}
        | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert child.returncode == 0, child.stderr[-4000:] + child.stdout[-4000:]
    return json.loads(output.read_text("utf-8"))


@pytest.fixture
def case(request: pytest.FixtureRequest) -> str:
    """A case that runs where what it needs is installed."""
    if request.param == "suffix":
        pytest.importorskip("arctic_inference.suffix_decoding")
    return request.param


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_equals_stock(stock: Result, offloaded: Result, case: str) -> None:
    """Every token with and without speculation; log-probabilities within 1e-4."""
    ours, theirs = offloaded[case], stock[CASES[case].get("like", case)]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["tokens"] == stock[settings(case)["model"]]["tokens"]
    assert len({token for tokens in theirs["tokens"] for token in tokens}) > MIN_TOKENS
    worst = max(
        abs(a - b)
        for mine, other in zip(ours["logprobs"], theirs["logprobs"], strict=True)
        for a, b in zip(mine, other, strict=True)
    )
    assert worst <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.parametrize("case", UNDISTURBED, indirect=True)
def test_accepts_what_stock_accepts(
    stock: Result, offloaded: Result, case: str
) -> None:
    """As many drafts, guessed tokens and accepted ones."""
    ours, theirs = offloaded[case], stock[CASES[case].get("like", case)]
    assert {name: ours[name] for name in COUNTERS} == {
        name: theirs[name] for name in COUNTERS
    }


@pytest.mark.parametrize("case", ACCEPTANCE, indirect=True)
def test_guesses_are_accepted_as_meant(offloaded: Result, case: str) -> None:
    """A model guesses itself always, a random head never, the others in between."""
    share = offloaded[case]["num_accepted_tokens"] / offloaded[case]["num_draft_tokens"]
    least, most = ACCEPTANCE[case]
    assert least <= share <= most


@pytest.mark.parametrize("case", [name for name in CASES if name not in UNDISTURBED])
def test_lost_node_preempts(offloaded: Result, case: str) -> None:
    """Whoever ran when the drafter lost its node starts again, from its tokens.

    The node was killed right before a forward pass of the drafter, in a pool that holds
    every request to its end: without the loss nothing is preempted.
    """
    assert offloaded[case]["kills"] == [1]
    first, _ = speculative_engines.prompts()
    most = [len(tokens) + NUM_TOKENS + NUM_DRAFTED for tokens in first]
    block_size = ENGINE["block_size"]
    assert offloaded[case]["num_blocks"] > sum(-(-n // block_size) for n in most)
    assert 0 < offloaded[case]["preemptions"] <= len(first)


@pytest.mark.parametrize("case", SMALL_POOLS)
def test_preempted(stock: Result, offloaded: Result, case: str) -> None:
    """In a pool of as many blocks as stock's."""
    assert offloaded[case]["num_blocks"] == stock[case]["num_blocks"]
    assert offloaded[case]["preemptions"] == stock[case]["preemptions"] > 0


@pytest.mark.parametrize("case", ["ngram in two KV groups", "eagle"])
def test_steps_were_cut(offloaded: Result, case: str) -> None:
    """In two micro-batches, also where they verify guesses."""
    (times,) = offloaded[case]["times"]
    assert times["num_cut_steps"] > 0
