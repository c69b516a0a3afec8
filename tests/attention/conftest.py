# SPDX-License-Identifier: Apache-2.0
"""One memory node for each module's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from node_process import NodeProcess, running_node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that a module's tests share."""
    cpu = str(max(os.sched_getaffinity(0)))
    options = ("--kv-cache-gib", "0.25", "--cpus", cpu)
    with running_node(tmp_path_factory.mktemp("node"), *options) as process:
        yield process
