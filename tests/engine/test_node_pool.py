# SPDX-License-Identifier: Apache-2.0
"""What an engine says of its memory nodes before it joins them."""

from __future__ import annotations

import logging

import pytest

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.node_pool import NodePool
from vllm_attn_offload.errors import MemoryNodeError


@pytest.mark.parametrize("node", ["node.invalid:7600", "127.0.0.1:1"])
def test_remote_nodes_without_a_token_are_named(
    node: str, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    # vLLM's logger hands nothing on to the root's handlers.
    vllm_logger = logging.getLogger("vllm")
    vllm_logger.addHandler(caplog.handler)
    request.addfinalizer(lambda: vllm_logger.removeHandler(caplog.handler))
    config = AttentionOffloadConfig(memory_nodes=[node], startup_timeout_s=1.0)
    pool = NodePool(config, "engine", (), ControlClient)
    with pytest.raises(MemoryNodeError):
        pool.join()
    is_named = f"no token is set for {node}" in caplog.text
    assert is_named == node.startswith("node.invalid")
