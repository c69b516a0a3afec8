# SPDX-License-Identifier: Apache-2.0
"""One memory node for all tests that leave it running."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from node_process import NodeProcess, running_node


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node with 0.25 GiB; sessions that a test opens are freed when it closes."""
    with running_node(
        tmp_path_factory.mktemp("node"),
        # One CPU: threads that spin against those of the tests cost most of the time.
        *("--kv-cache-gib", "0.25", "--cpus", str(max(os.sched_getaffinity(0)))),
    ) as process:
        yield process
