# SPDX-License-Identifier: Apache-2.0
"""Servers that lose memory nodes while clients read: late tokens, never wrong ones."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "e2e")]

import faults  # noqa: E402
import tiny_llama  # noqa: E402
import workload  # noqa: E402
from serve import ServeProcess  # noqa: E402

NUM_TOKENS = 40
DEADLINE_S = 240.0
REQUEST_TIMEOUT_S = 4.0

Fault = Callable[[psutil.Process], object]
Tokens = list[list[int]]


class Engine:
    """A server with local memory nodes, and what it answers when nothing happens."""

    def __init__(
        self, model: str, log: Path, prompts: Tokens, *options: str, **variables: str
    ) -> None:
        config = {
            "num_local_nodes": 2,
            "kv_cache_gib": 0.25,
            "request_timeout_s": REQUEST_TIMEOUT_S,
        }
        self.server = ServeProcess(
            model,
            log,
            *("--attention-offload", "--attention-offload-config", json.dumps(config)),
            *("--enforce-eager", "--dtype", "float32", *options),
            **variables,
        )
        self.prompts = prompts
        self.undisturbed = self.stream().finish(DEADLINE_S)
        assert all(len(tokens) == NUM_TOKENS for tokens in self.undisturbed)

    def stream(self) -> faults.Streams:
        return faults.Streams(
            self.server.url, self.server.model, self.prompts, NUM_TOKENS
        )

    def nodes(self) -> list[psutil.Process]:
        return faults.memory_nodes(self.server.process.pid)

    def num_recoveries(self) -> int:
        return self.server.log.read_text("utf-8", "replace").count(faults.IS_BACK)

    def assert_recovered(self, streams: faults.Streams, before: int) -> None:
        assert streams.finish(DEADLINE_S) == self.undisturbed
        assert self.num_recoveries() > before
        assert len(self.nodes()) == 2


@pytest.fixture(scope="module")
def engine(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """SmolLM2 on two nodes that share its blocks; prompts come in several chunks."""
    first, _ = workload.prompts(smollm2, "float32")
    prompts = [prompt for prompt in first if 30 < len(prompt) < 300][::3]
    started = Engine(
        smollm2,
        tmp_path_factory.mktemp("recovery") / "serve.log",
        prompts,
        *("--max-model-len", "512", "--max-num-batched-tokens", "128"),
    )
    yield started
    started.server.kill_all()


@pytest.mark.parametrize(
    ("fault", "num_victims"),
    [
        (faults.kill, 1),
        (faults.kill, 2),
        (faults.stop, 1),
        (faults.drop_connections, 1),
    ],
    ids=["kill", "kill-both", "stop", "drop"],
)
def test_in_decode(engine: Engine, fault: Fault, num_victims: int) -> None:
    before = engine.num_recoveries()
    streams = engine.stream()
    total = NUM_TOKENS * len(engine.prompts)
    assert streams.wait_for(random.randint(total // 4, total // 2), DEADLINE_S)
    for node in random.sample(engine.nodes(), num_victims):
        fault(node)
    engine.assert_recovered(streams, before)


def test_in_prefill(engine: Engine) -> None:
    """Between two chunks, or in one."""
    before = engine.num_recoveries()
    streams = engine.stream()
    time.sleep(random.uniform(0.0, 0.2))
    faults.kill(random.choice(engine.nodes()))
    engine.assert_recovered(streams, before)


def test_idle(engine: Engine) -> None:
    """Nothing is left of cached prefixes; the next request waits for the node."""
    before = engine.num_recoveries()
    faults.kill(engine.nodes()[0])
    engine.assert_recovered(engine.stream(), before)


def test_nothing_is_left(engine: Engine) -> None:
    """Also not of nodes that were started again."""
    assert engine.server.end(signal.SIGINT) == []


def test_one_tensor_parallel_rank_is_cut_off(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The other one computes with it, and must not believe what comes of it."""
    model = tmp_path_factory.mktemp("model")
    tiny_llama.save(model)
    engine = Engine(
        str(model),
        model / "serve.log",
        tiny_llama.PROMPTS,
        *("--skip-tokenizer-init", "--tensor-parallel-size", "2"),
        *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--block-size", "32"),
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    try:
        before = engine.num_recoveries()
        (worker,) = [
            child
            for child in engine.server.children
            if "Worker_TP1" in " ".join(child.cmdline())
        ]
        peer = faults.address(engine.nodes()[1]).removeprefix("unix:")
        streams = engine.stream()
        assert streams.wait_for(NUM_TOKENS, DEADLINE_S)
        assert faults.drop_connections(worker, peer) == 1
        engine.assert_recovered(streams, before)
    finally:
        engine.server.kill_all()
