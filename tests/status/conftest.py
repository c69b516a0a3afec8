# SPDX-License-Identifier: Apache-2.0
"""Four memory nodes, and sessions on them that have attended."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from node_process import NodeProcess
from steady_worker import SteadyWorker

NUM_NODES = 4


@pytest.fixture(scope="package")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NodeProcess]]:
    """Nodes over TCP, each with a name."""
    directory = tmp_path_factory.mktemp("nodes")
    cpu = str(max(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        started = []
        for index in range(NUM_NODES):
            node = NodeProcess(
                "127.0.0.1:0",
                directory / f"{index}.log",
                *("--name", f"shelf-{index}", "--kv-cache-gib", "0.1", "--cpus", cpu),
            )
            stack.callback(node.kill)
            started.append(node)
        yield started


@pytest.fixture
def addresses(nodes: list[NodeProcess]) -> list[str]:
    """Where they listen."""
    return [node.address for node in nodes]


@pytest.fixture
def work_on(addresses: list[str]) -> Iterator[Callable[[int], SteadyWorker]]:
    """Opens a session on the node of a number, until the test ends."""
    with ExitStack() as stack:

        def opened(index: int) -> SteadyWorker:
            worker = SteadyWorker(addresses[index])
            stack.callback(worker.close)
            return worker

        yield opened


@pytest.fixture(scope="session")
def command() -> Path:
    """The installed command."""
    return Path(sys.executable).with_name("vllm-attn-offload")
