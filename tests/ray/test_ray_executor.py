# SPDX-License-Identifier: Apache-2.0
"""Ranks that are Ray actors, one on each of two raylets, with running memory nodes.

They compute on CPUs, which vLLM itself places no workers on: see `ray_on_cpu`.
"""

from __future__ import annotations

import json
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray_on_cpu
from harness import faults, tiny_llama
from harness.footprint import Footprint
from harness.serve_process import ServeProcess
from node_process import NodeProcess, eventually, running_node
from ray import cloudpickle
from ray.cluster_utils import Cluster

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.engine.ray_executor import RayAttentionOffloadExecutor
from vllm_attn_offload.transport.trust import Credentials

OURS, MIXIN = "RayAttentionOffloadExecutor", "AttentionOffloadExecutorMixin"
NUM_TOKENS = 20
DEADLINE_S = 120.0
OBJECT_STORE_BYTES = 80 << 20

pytestmark = pytest.mark.long


class Engine:
    """A server whose two ranks Ray has placed, and its nodes: two and a standby.

    Args:
        model: The tiny Llama.
        directory: For logs, token and plugin.
        cpu: Of the nodes.
        address: Of the cluster.
    """

    def __init__(self, model: str, directory: Path, cpu: str, address: str) -> None:
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text("a secret of these tests, 32+ characters\n")
        self.credentials = Credentials(str(token))
        # On TCP, as nodes are that workers of several hosts reach.
        host = address.partition(":")[0]
        options = ("--kv-cache-gib", "0.1", "--auth-token-file", str(token))
        self.nodes = [
            NodeProcess(
                f"{host}:0",
                directory / f"node-{index}.log",
                *(*options, "--cpus", cpu),
                ATTN_OFFLOAD_POISON_KV="1",
            )
            for index in range(3)
        ]
        *joined, standby = (node.address for node in self.nodes)
        config = {
            "memory_nodes": joined,
            "standby_nodes": [standby],
            "kv_cache_gib": 0.05,
            "auth_token_file": str(token),
        }
        self.server = ServeProcess(
            model,
            directory / "serve.log",
            *("--attention-offload", "--attention-offload-config", json.dumps(config)),
            *("--distributed-executor-backend", "ray", "--tensor-parallel-size", "2"),
            *("--enforce-eager", "--dtype", "float32", "--skip-tokenizer-init"),
            *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--block-size", "32"),
            RAY_ADDRESS=address,
            **ray_on_cpu.install(directory),
        )
        # vLLM kills workers, which then leave their shared memory.
        self._footprints = [Footprint(worker.pid) for worker in workers()]
        self.undisturbed = self.stream().finish(DEADLINE_S)
        for footprint in self._footprints:
            footprint.look()

    def stream(self) -> faults.Streams:
        url, model = self.server.url, self.server.model
        return faults.Streams(url, model, tiny_llama.PROMPTS, NUM_TOKENS)

    def num_recoveries(self) -> int:
        return self.server.log.read_text("utf-8", "replace").count(faults.IS_BACK)

    def kv_bytes_held(self, node: NodeProcess) -> int:
        control = ControlClient(node.address, 5, self.credentials)
        control.close()
        return control.info.kv_bytes_total - control.info.kv_bytes_free

    def kill(self) -> None:
        self.server.kill_all()
        for footprint in self._footprints:
            footprint.remove()
        for node in self.nodes:
            node.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two raylets with a logical GPU each."""
    host = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
    head = host | {"include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(**host)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def engine(
    cluster: Cluster,
    tiny_model: str,
    node_cpu: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("ray-executor")
    started = Engine(tiny_model, directory, node_cpu, cluster.address)
    yield started
    started.kill()


def workers() -> list[psutil.Process]:
    """Ranks of the engine: Ray names a process by what it runs."""
    found = psutil.Process().children(recursive=True)
    return [child for child in found if child.name().startswith("ray::RayWorkerProc")]


def test_equals_stock(engine: Engine, tiny_tokens: list[list[int]]) -> None:
    first = [tokens[: tiny_llama.NUM_TOKENS] for tokens in engine.undisturbed]
    assert first == tiny_tokens


@pytest.mark.parametrize("index", [0, 1])
def test_one_rank_is_cut_off(engine: Engine, index: int) -> None:
    """The other one computes with it; a loss that only one rank met is heard of."""
    before = engine.num_recoveries()
    streams = engine.stream()
    assert streams.wait_for(NUM_TOKENS, DEADLINE_S)
    assert faults.drop_connections(workers()[index], engine.nodes[0].address) == 1
    assert streams.finish(DEADLINE_S) == engine.undisturbed
    assert engine.num_recoveries() > before


def test_memory_node_is_killed(engine: Engine) -> None:
    before = engine.num_recoveries()
    streams = engine.stream()
    assert streams.wait_for(NUM_TOKENS, DEADLINE_S)
    engine.nodes[1].kill()
    assert streams.finish(DEADLINE_S) == engine.undisturbed
    assert engine.num_recoveries() > before
    assert "takes over" in engine.server.log.read_text("utf-8")


def test_sigterm_leaves_nothing(engine: Engine) -> None:
    """Ray has not replaced the engine's handler, which leaves nodes before it ends."""
    server = engine.server
    ended = workers()
    assert len(ended) == 2
    assert server.stop() != -signal.SIGKILL
    assert psutil.wait_procs([*ended, *server.children], timeout=10)[1] == []
    assert list(server.directory.glob("attn-offload-*")) == []
    left = [engine.nodes[0], engine.nodes[2]]
    assert eventually(lambda: not any(map(engine.kv_bytes_held, left)))


@pytest.fixture
def in_this_process(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """An engine in this process would find the cluster, once the server is gone."""
    variables = ray_on_cpu.install(tmp_path) | {"RAY_ADDRESS": cluster.address}
    variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vllm.platforms.cpu.CpuPlatform.ray_device_key", "GPU")
    yield
    ray.shutdown()


def start(model: str, nodes: list[str], **options: Any) -> None:
    from vllm_attn_offload import LLM

    LLM(
        model,
        attention_offload=True,
        attention_offload_config={"memory_nodes": nodes},
        distributed_executor_backend="ray",
        skip_tokenizer_init=True,
        **tiny_llama.engine_options(),
        **options,
    )


@pytest.mark.usefixtures("in_this_process")
def test_refuses_local_nodes(tiny_model: str) -> None:
    with pytest.raises(ValueError, match="given without memory_nodes. Allowed: "):
        start(tiny_model, [])


@pytest.mark.usefixtures("in_this_process")
def test_worker_says_why_it_does_not_start(tiny_model: str, tmp_path: Path) -> None:
    """Not only its traceback, as Ray's own error does."""
    with (
        running_node(tmp_path, "--kv-cache-gib", "0.1") as node,
        pytest.raises(ValueError, match="^Could not find checkpoint files"),
    ):
        start(tiny_model, [node.address], load_format="sharded_state")
    # This process goes on, and another engine may want the GPUs.
    assert eventually(lambda: ray.available_resources().get("GPU") == 2.0, 30)


@pytest.mark.parametrize(
    ("name", "owners"),
    [
        ("_prepare_cluster", [OURS, MIXIN]),
        ("_init_executor", [OURS, MIXIN, "_RayWorkers", "RayExecutorV2"]),
        ("determine_available_memory", [MIXIN, "Executor"]),
        ("initialize_from_config", [MIXIN, "Executor"]),
        ("sample_tokens", [MIXIN, "MultiprocExecutor"]),
        ("check_health", [MIXIN, "MultiprocExecutor"]),
        ("register_failure_callback", [MIXIN, "MultiprocExecutor"]),
        ("shutdown", [MIXIN, "_RayWorkers", "RayExecutorV2"]),
        ("start_worker_monitor", ["RayExecutorV2"]),
        ("collective_rpc", ["MultiprocExecutor"]),
        ("supports_async_scheduling", ["MultiprocExecutor"]),
    ],
)
def test_vllm_classes_are_called_in_turn(name: str, owners: list[str]) -> None:
    mro = RayAttentionOffloadExecutor.__mro__
    found = [each.__name__ for each in mro if name in vars(each)]
    assert found[: len(owners)] == owners


def test_class_travels_by_reference() -> None:
    """To workers, in the configuration; vLLM tells by it that the engine uses Ray."""
    copy = pickle.loads(cloudpickle.dumps(RayAttentionOffloadExecutor))
    assert copy is RayAttentionOffloadExecutor
    assert copy.uses_ray
