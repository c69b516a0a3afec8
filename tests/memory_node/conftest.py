# SPDX-License-Identifier: Apache-2.0
"""One memory node for all tests that leave it running, and the kernels of nodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from node_process import NodeProcess, running_node

from vllm_attn_offload.memory_node.decode_attention import create_decode_attention
from vllm_attn_offload.memory_node.decode_attention.base import DecodeAttention
from vllm_attn_offload.native.attention import load_cpu_library


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node with 0.25 GiB; sessions that a test opens are freed when it closes."""
    with running_node(
        tmp_path_factory.mktemp("node"),
        # One CPU: threads that spin against those of the tests cost most of the time.
        *("--kv-cache-gib", "0.25", "--cpus", str(max(os.sched_getaffinity(0)))),
    ) as process:
        yield process


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., NodeProcess]]:
    """Starts nodes of a test's own; the first argument is where they listen."""
    nodes: list[NodeProcess] = []

    def start_node(listen: str, *options: str) -> NodeProcess:
        log, room = tmp_path / "node.log", ("--kv-cache-gib", "0.1")
        nodes.append(NodeProcess(listen, log, *room, *options))
        return nodes[-1]

    yield start_node
    for node in nodes:
        node.kill()


@pytest.fixture(scope="module", params=["cpp", "torch", "triton"])
def attention(request: pytest.FixtureRequest) -> DecodeAttention[Any, Any]:
    """Each kernel in turn, in this process."""
    if request.param == "cpp" and load_cpu_library() is None:
        pytest.skip("the CPU kernel library is not built: no C++ compiler at install")
    threads = torch.get_num_threads()
    created = create_decode_attention(request.param, "cpu")
    torch.set_num_threads(threads)
    return created
