# SPDX-License-Identifier: Apache-2.0
"""Test helpers of nodes, workers and channels lie in their folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for folder in ("memory_node", "client", "transport", "attention"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

from node_process import NodeProcess, running_node  # noqa: E402


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that a module's tests share."""
    cpu = str(max(os.sched_getaffinity(0)))
    options = ("--kv-cache-gib", "0.25", "--cpus", cpu)
    with running_node(tmp_path_factory.mktemp("node"), *options) as process:
        yield process
