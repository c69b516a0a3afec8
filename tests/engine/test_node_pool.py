# SPDX-License-Identifier: Apache-2.0
"""What an engine says of its memory nodes before it joins them, and how it tries."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import closing
from pathlib import Path

import pytest
from node_process import eventually, running_node
from raw_session import make_geometry

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.engine_identity import EngineIdentity
from vllm_attn_offload.engine.node_pool import NodePool
from vllm_attn_offload.engine.session_limits import SessionLimits
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess

KV_GIB = 0.01


@pytest.mark.parametrize("node", ["node.invalid:7600", "127.0.0.1:1"])
def test_remote_nodes_without_a_token_are_named(
    node: str, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    # vLLM's logger hands nothing on to the root's handlers.
    vllm_logger = logging.getLogger("vllm")
    vllm_logger.addHandler(caplog.handler)
    request.addfinalizer(lambda: vllm_logger.removeHandler(caplog.handler))
    config = AttentionOffloadConfig(memory_nodes=[node], startup_timeout_s=1.0)
    pool = NodePool(config, EngineIdentity("engine"), (), ControlClient)
    with pytest.raises(MemoryNodeError):
        pool.join()
    is_named = f"no token is set for {node}" in caplog.text
    assert is_named == node.startswith("node.invalid")


class OnlyPlace:
    """Starts nodes until there is no place left for one, and counts the tries."""

    def __init__(self, directory: Path, cpus: str) -> None:
        self.is_gone = False
        self.num_tries = 0
        self._directory = directory
        self._cpus = cpus

    def __call__(self, kv_cache_gib: float | None) -> MemoryNodeProcess:
        self.num_tries += 1
        if self.is_gone:
            raise MemoryNodeError("1 of 1 (Ray)", "there is no place for it.")
        return MemoryNodeProcess(
            self._directory,
            kv_cache_gib=kv_cache_gib or KV_GIB,
            cpus=self._cpus,
            startup_timeout_s=60,
        )


def test_a_node_without_a_place_is_tried_once(tmp_path: Path, node_cpu: str) -> None:
    """Each time, because a try may last long; then a standby takes over."""
    place = OnlyPlace(tmp_path / "local", node_cpu)
    options = ("--kv-cache-gib", str(KV_GIB), "--cpus", node_cpu)
    with running_node(tmp_path, *options) as standby:
        config = AttentionOffloadConfig(
            kv_cache_gib=KV_GIB, standby_nodes=[standby.address]
        )
        pool = NodePool(config, EngineIdentity("engine"), [place], ControlClient)
        with closing(pool):
            pool.join()
            (num_blocks,) = pool.reserve([make_geometry()], 1)
            pool.open_sessions([num_blocks], SessionLimits(2048, 64, 64))
            (node,) = pool.nodes
            assert node.pid is not None
            place.is_gone = True
            os.kill(node.pid, signal.SIGKILL)
            assert eventually(lambda: node.is_lost)
            with pytest.raises(MemoryNodeError, match="there is no place"):
                pool.reopen(use_standby=False)
            assert place.num_tries == 2
            ((attachment,),) = pool.reopen(use_standby=True)
            assert place.num_tries == 3
            assert attachment.address == standby.address
            assert attachment.num_blocks == num_blocks
