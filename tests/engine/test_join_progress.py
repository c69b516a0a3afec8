# SPDX-License-Identifier: Apache-2.0
"""While an engine waits for memory nodes it says for which."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from node_process import NodeProcess, eventually
from stopped import stop_process

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.engine_identity import EngineIdentity
from vllm_attn_offload.engine.node_pool import NodePool
from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture,
) -> Iterator[pytest.LogCaptureFixture]:
    """What vLLM's loggers say, which hand nothing on to the root's handlers."""
    vllm_logger = logging.getLogger("vllm")
    vllm_logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "vllm"):
        yield caplog
    vllm_logger.removeHandler(caplog.handler)


def test_remote_nodes_that_are_late_are_named(
    tmp_path: Path, node_cpu: str, log: pytest.LogCaptureFixture
) -> None:
    """At once, and again while one of two does not answer."""
    options = ("--kv-cache-gib", "0.01", "--cpus", node_cpu)
    nodes = [
        NodeProcess("127.0.0.1:0", tmp_path / f"{index}.log", *options)
        for index in range(2)
    ]
    config = AttentionOffloadConfig(memory_nodes=[each.address for each in nodes])
    pool = NodePool(config, EngineIdentity("engine"), (), ControlClient)
    try:
        stop_process(nodes[1].process.pid)
        with closing(pool), ThreadPoolExecutor(1) as threads:
            joined = threads.submit(pool.join)
            late = f"1 of 2 memory node(s) not there yet: {nodes[1].address}"
            is_said = eventually(lambda: late in log.text, 30)
            nodes[1].process.send_signal(signal.SIGCONT)
            joined.result(60)
        assert is_said
    finally:
        for each in nodes:
            each.kill()
    assert (
        f"connecting to memory node(s) {nodes[0].address}, {nodes[1].address}, at most "
        "60 s each" in log.text
    )
    assert "after 5 of at most 60 s, " in log.text


def test_local_nodes_are_counted(
    tmp_path: Path, node_cpu: str, log: pytest.LogCaptureFixture
) -> None:
    def launch(kv_cache_gib: float | None) -> MemoryNodeProcess:
        time.sleep(6)  # until the engine says what it waits for
        return MemoryNodeProcess(
            tmp_path / "node",
            kv_cache_gib=kv_cache_gib or 0.01,
            cpus=node_cpu,
            startup_timeout_s=60,
        )

    config = AttentionOffloadConfig(startup_timeout_s=45)
    pool = NodePool(config, EngineIdentity("engine"), [launch], ControlClient)
    with closing(pool):
        pool.join()
    assert "starting 1 memory node(s), at most 45 s each" in log.text
    assert "1 of 1 memory node(s) not there yet" in log.text
