# SPDX-License-Identifier: Apache-2.0
"""Servers that lose memory nodes while clients read: late tokens, never wrong ones.

One server starts its nodes itself; the other, with two ranks, joins running ones.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import workload
from harness import faults, tiny_llama
from harness.serve_process import ServeProcess
from harness.slow_link import SlowLink
from node_process import NodeProcess, eventually

from vllm_attn_offload.client.control_client import ControlClient

NUM_TOKENS = 40
DEADLINE_S = 240.0
REQUEST_TIMEOUT_S = 4.0
#: What is sent meanwhile never arrives.
SILENT_S = 1e6

Fault = Callable[[psutil.Process], object]
Tokens = list[list[int]]

pytestmark = pytest.mark.long


class Engine:
    """A server with two memory nodes, and what it answers when nothing happens."""

    def __init__(
        self,
        model: str,
        log: Path,
        prompts: Tokens,
        nodes: dict[str, Any],
        *options: str,
        **variables: str,
    ) -> None:
        config = {
            **nodes,
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
        if self.num_recoveries() == before:
            # A fast host had sent the last token before the fault came.
            assert self.stream().finish(DEADLINE_S) == self.undisturbed
        assert self.num_recoveries() > before


@pytest.fixture(scope="module")
def engine(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """SmolLM2 on two nodes that share its blocks; prompts come in several chunks."""
    first, _ = workload.prompts(smollm2, "float32")
    prompts = [prompt for prompt in first if 30 < len(prompt) < 300][::3]
    started = Engine(
        smollm2,
        tmp_path_factory.mktemp("recovery") / "serve.log",
        prompts,
        {"num_local_nodes": 2},
        *("--max-model-len", "512", "--max-num-batched-tokens", "128"),
        VLLM_SERVER_DEV_MODE="1",  # for /pause
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
    assert len(engine.nodes()) == 2


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


def test_in_a_pause(engine: Engine) -> None:
    """``mode=wait`` returns when all running requests have all their tokens."""
    before = engine.num_recoveries()
    streams = engine.stream()
    # What waits for its first step is new, and would wait for the end of the pause.
    assert eventually(lambda: all(streams.tokens), DEADLINE_S)
    with ThreadPoolExecutor(1) as threads:
        url = f"{engine.server.url}/pause"
        paused = threads.submit(
            httpx.post, url, params={"mode": "wait"}, timeout=DEADLINE_S
        )
        log = engine.server.log
        assert eventually(lambda: "PAUSED_NEW" in log.read_text("utf-8"), DEADLINE_S)
        faults.kill(random.choice(engine.nodes()))
        assert paused.result().status_code == 200
    assert streams.finish(5.0) == engine.undisturbed
    assert httpx.post(f"{engine.server.url}/resume").status_code == 200
    engine.assert_recovered(streams, before)


def test_nothing_is_left(engine: Engine) -> None:
    """Also not of nodes that were started again."""
    assert engine.server.end(signal.SIGINT) == []


class RunningNodes:
    """Two nodes that an engine joins and a standby, started as users start them.

    Attributes:
        link: The engine's way to the first one.

    Args:
        directory: For sockets and logs.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[NodeProcess] = []
        self.first = self.start("127.0.0.1:0")
        host, port = self.first.address.split(":")
        self.link = SlowLink((host, int(port)))
        threading.Thread(target=self.link.serve, daemon=True).start()
        self.second = self.start(f"unix:{directory / 'second.sock'}")
        self.standby = self.start(f"unix:{directory / 'standby.sock'}")

    def start(self, listen: str) -> NodeProcess:
        """One more; returns when it is ready."""
        log = self._directory / f"node{len(self._started)}.log"
        self._started.append(NodeProcess(listen, log, "--kv-cache-gib", "0.5"))
        return self._started[-1]

    def addresses(self) -> list[str]:
        """Those that still run."""
        return [node.address for node in self._started if node.process.poll() is None]

    def kill(self) -> None:
        """End all of them."""
        for node in self._started:
            node.kill()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNodes]:
    nodes = RunningNodes(tmp_path_factory.mktemp("nodes"))
    yield nodes
    nodes.kill()


@pytest.fixture(scope="module")
def joined(
    running: RunningNodes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Two tensor-parallel ranks of a small model on nodes that run already."""
    model = tmp_path_factory.mktemp("model")
    tiny_llama.save(model)
    started = Engine(
        str(model),
        model / "serve.log",
        tiny_llama.PROMPTS,
        {
            "memory_nodes": [running.link.address, running.second.address],
            "standby_nodes": [running.standby.address],
        },
        *("--skip-tokenizer-init", "--tensor-parallel-size", "2"),
        *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--block-size", "32"),
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    yield started
    started.server.kill_all()


@pytest.mark.parametrize("kind", ["link", "second"], ids=["tcp", "unix"])
def test_one_tensor_parallel_rank_is_cut_off(
    joined: Engine, running: RunningNodes, kind: str
) -> None:
    """The other one computes with it, and must not believe what comes of it."""
    before = joined.num_recoveries()
    (worker,) = [
        child
        for child in joined.server.children
        if "Worker_TP1" in " ".join(child.cmdline())
    ]
    streams = joined.stream()
    assert streams.wait_for(NUM_TOKENS, DEADLINE_S)
    peer = getattr(running, kind).address.removeprefix("unix:")
    assert faults.drop_connections(worker, peer) == 1
    joined.assert_recovered(streams, before)


def test_link_goes_silent(joined: Engine, running: RunningNodes) -> None:
    """A half-open connection: nothing arrives any more, and nothing says so."""
    before = joined.num_recoveries()
    streams = joined.stream()
    assert streams.wait_for(NUM_TOKENS, DEADLINE_S)
    running.link.delay_s = SILENT_S
    late = joined.stream()
    time.sleep(1.5 * REQUEST_TIMEOUT_S)
    running.link.delay_s = 0.0
    assert late.finish(DEADLINE_S) == joined.undisturbed
    joined.assert_recovered(streams, before)
    assert "takes over" not in joined.server.log.read_text("utf-8")


def test_hostile_bytes_under_load(joined: Engine, running: RunningNodes) -> None:
    """No client waits for what a stranger does."""
    before = joined.num_recoveries()
    streams = joined.stream()
    assert streams.wait_for(NUM_TOKENS, DEADLINE_S)
    for node in (running.first, running.second):
        for seed in range(20):
            faults.send_garbage(node.address, random.Random(seed))
    assert streams.finish(DEADLINE_S) == joined.undisturbed
    assert joined.num_recoveries() == before


def test_standby_takes_over(joined: Engine, running: RunningNodes) -> None:
    """A node dies and stays away; both ranks go on with another one."""
    before = joined.num_recoveries()
    streams = joined.stream()
    assert streams.wait_for(NUM_TOKENS, DEADLINE_S)
    running.first.kill()
    joined.assert_recovered(streams, before)
    assert f"standby {running.standby.address} takes over" in joined.server.log_tail()
    assert kv_bytes_held(running.standby.address) > 0


def test_node_is_started_again_by_hand(joined: Engine, running: RunningNodes) -> None:
    """The engine waits for it, where no standby is left, and joins it again."""
    before = joined.num_recoveries()
    streams = joined.stream()
    assert streams.wait_for(NUM_TOKENS, DEADLINE_S)
    held = kv_bytes_held(running.second.address)
    running.second.kill()
    running.first.kill()
    time.sleep(2.0)
    running.second = running.start(running.second.address)
    joined.assert_recovered(streams, before)
    assert kv_bytes_held(running.second.address) == held


def kv_bytes_held(address: str) -> int:
    control = ControlClient(address, 5)
    control.close()
    return control.info.kv_bytes_total - control.info.kv_bytes_free


def test_engine_is_killed(joined: Engine, running: RunningNodes) -> None:
    """Nodes free what it held, though no goodbye comes."""
    nodes = [address for address in running.addresses() if kv_bytes_held(address)]
    assert len(nodes) == 2
    (core,) = [
        child for child in joined.server.children if child.name() == "VLLM::EngineCore"
    ]
    core.kill()
    assert eventually(lambda: not any(map(kv_bytes_held, nodes)), 30)
    joined.server.process.wait(DEADLINE_S)
    assert joined.server.end(signal.SIGKILL) == []
