# SPDX-License-Identifier: Apache-2.0
"""Which executor an engine over several hosts gets, and what it is refused."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.ray_executor import RayDistributedExecutor
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
from vllm_attn_offload.patches import apply_patches

from vllm_attn_offload.engine.args import CPU_WORKER_CLS
from vllm_attn_offload.engine.executor import AttentionOffloadExecutor
from vllm_attn_offload.engine.executor_choice import EXECUTOR_CLS, choose_executor

NODES = {"memory_nodes": "10.0.0.7:7600"}
#: SmolLM2 has three KV heads.
ON_HOSTS: dict[str, Any] = {"tensor_parallel_size": 3, "nnodes": 3}


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch) -> None:
    apply_patches()
    # Restored afterwards: configuring an engine writes them.
    monkeypatch.setenv("ATTN_OFFLOAD_RUN_DIR", "unused")
    monkeypatch.setenv("ATTN_OFFLOAD_DATA_PARALLEL_SIZE", "1")
    monkeypatch.setenv("ATTN_OFFLOAD_OUTAGE_BOARD", "unused")


def create(model: str, offload: dict[str, Any], **arguments: Any) -> VllmConfig:
    return EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        additional_config={"attention_offload": offload},
        **arguments,
    ).create_engine_config()


@pytest.mark.parametrize("backend", [None, "mp", "uni", AttentionOffloadExecutor])
def test_leader(smollm2: str, backend: Any) -> None:
    config = create(smollm2, NODES, distributed_executor_backend=backend, **ON_HOSTS)
    parallel = config.parallel_config
    assert parallel.distributed_executor_backend == EXECUTOR_CLS
    assert parallel.worker_cls == CPU_WORKER_CLS
    assert parallel.local_world_size == 1
    assert config.scheduler_config.scheduler_cls is not None


def test_follower(smollm2: str) -> None:
    """It starts workers of ours in vLLM's executor, and keeps nothing for an engine."""
    before = dict(os.environ)
    parallel = create(smollm2, NODES, node_rank=2, **ON_HOSTS).parallel_config
    assert parallel.distributed_executor_backend == "mp"
    assert parallel.worker_cls == CPU_WORKER_CLS
    ours = [name for name in os.environ if name.startswith("ATTN_OFFLOAD_")]
    assert {name: os.environ[name] for name in ours} == {
        name: before[name] for name in ours
    }


def test_files_are_read_on_every_host(smollm2: str, tmp_path: Path) -> None:
    token = str(tmp_path / "token")
    for node_rank in (0, 1):
        with pytest.raises(ValueError, match=f"'{token}' cannot be read .*Allowed: a"):
            create(
                smollm2,
                NODES | {"auth_token_file": token},
                node_rank=node_rank,
                **ON_HOSTS,
            )


@pytest.mark.parametrize(
    ("offload", "given"),
    [
        ({}, "nnodes=3 was given without memory_nodes, and local nodes serve one"),
        ({"memory_nodes": "127.0.0.1:1"}, "127.0.0.1 is each host itself"),
        ({"memory_nodes": "127.8.8.8:1"}, "127.8.8.8 is each host itself"),
        ({"memory_nodes": "localhost:1"}, "the memory node localhost:1 was given with"),
        ({"memory_nodes": "0.0.0.0:1"}, "0.0.0.0 is each host itself"),
        ({"memory_nodes": "[::1]:1"}, "::1 is each host itself"),
        ({"memory_nodes": "[::]:1"}, ":: is each host itself"),
        ({"memory_nodes": "[::ffff:127.0.0.1]:1"}, "is each host itself"),
        ({"memory_nodes": "unix:/tmp/a"}, "only processes of one host reach a Unix"),
        (NODES | {"standby_nodes": "localhost:1"}, "the memory node localhost:1 was"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_refused_nodes(smollm2: str, offload: dict[str, Any], given: str) -> None:
    """Before any process starts, on leader and followers."""
    for node_rank in (0, 1):
        with pytest.raises(ValueError, match=re.escape(given)) as error:
            create(smollm2, offload, node_rank=node_rank, **ON_HOSTS)
        assert "Allowed: HOST:PORT of memory nodes that every host" in str(error.value)


def test_own_name(smollm2: str) -> None:
    """Refused on loopback, where Debian's /etc/hosts has it: others know another."""
    name = socket.gethostname()
    addresses = {info[4][0] for info in socket.getaddrinfo(name, 1)}
    offload = {"memory_nodes": f"{name}:7600"}
    if not any(str(address).startswith("127.") for address in addresses):
        create(smollm2, offload, **ON_HOSTS)
        return
    with pytest.raises(ValueError, match="is each host itself"):
        create(smollm2, offload, **ON_HOSTS)


@pytest.mark.parametrize(
    "arguments",
    [
        {"data_parallel_size_local": 1, "data_parallel_start_rank": 1},
        {"data_parallel_size_local": 2, "data_parallel_hybrid_lb": True},
    ],
    ids=["external", "hybrid"],
)
def test_ranks_on_hosts(smollm2: str, arguments: dict[str, Any]) -> None:
    """Engines on a host each, without nnodes: as on one host."""
    config = create(
        smollm2,
        NODES,
        data_parallel_size=4,
        data_parallel_address="10.0.0.1",
        **arguments,
    )
    assert config.parallel_config.distributed_executor_backend == EXECUTOR_CLS
    assert os.environ["ATTN_OFFLOAD_DATA_PARALLEL_SIZE"] == "4"


def test_ray(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of ours for each of vLLM's names; the rest is said in a sentence."""
    from vllm_attn_offload.engine.ray_executor import RayAttentionOffloadExecutor

    engine_args = EngineArgs(smollm2, distributed_executor_backend="ray")
    with pytest.raises(
        ValueError, match="=ray was given for a compute node on cpu, wh"
    ):
        choose_executor(engine_args)
    monkeypatch.setattr(type(current_platform), "ray_device_key", "GPU")
    for backend in ("ray", RayExecutorV2, RayAttentionOffloadExecutor):
        engine_args.distributed_executor_backend = backend
        choose_executor(engine_args)
        chosen = engine_args.distributed_executor_backend
        assert chosen is RayAttentionOffloadExecutor
    engine_args.nnodes = 2
    with pytest.raises(ValueError, match="nnodes=2 was given together with Ray, which"):
        choose_executor(engine_args)
    engine_args.distributed_executor_backend = RayDistributedExecutor
    with pytest.raises(ValueError, match="RayDistributedExecutor was given together"):
        choose_executor(engine_args)
    engine_args.distributed_executor_backend = "ray"
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    with pytest.raises(ValueError, match="VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 was gi"):
        choose_executor(engine_args)


@pytest.mark.parametrize("backend", ["external_launcher", MultiprocExecutor])
def test_refused_executors(smollm2: str, backend: Any) -> None:
    message = f"distributed_executor_backend={backend!r} was given together with att"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        create(smollm2, NODES, distributed_executor_backend=backend)
    assert "Allowed: mp, uni, ray or" in str(error.value)
