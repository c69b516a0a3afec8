# SPDX-License-Identifier: Apache-2.0
"""A memory node, started as the node's own tests do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_process import NodeProcess, running_nodes

OPTIONS = ("--kv-cache-gib", "0.1", "--cpus", str(max(os.sched_getaffinity(0))))


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node on TCP that all tests share."""
    log = tmp_path_factory.mktemp("node") / "node.log"
    process = NodeProcess("127.0.0.1:0", log, *OPTIONS)
    yield process
    process.kill()


@pytest.fixture
def mortal_node(tmp_path: Path) -> Iterator[NodeProcess]:
    """A node that the test may kill."""
    process = NodeProcess("127.0.0.1:0", tmp_path / "node.log", *OPTIONS)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def poisoned_addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Three nodes, whose unwritten blocks hold NaN."""
    directories = [tmp_path_factory.mktemp("node") for _ in range(3)]
    options = ("--kv-cache-gib", "0.25", "--cpus", str(max(os.sched_getaffinity(0))))
    with running_nodes(directories, *options, ATTN_OFFLOAD_POISON_KV="1") as running:
        yield running
