# SPDX-License-Identifier: Apache-2.0
"""A real memory node for tests, and a wait for what it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness.memory_node import COMMAND, NodeProcess, running_node

__all__ = ["COMMAND", "NodeProcess", "eventually", "running_node", "running_nodes"]


@contextmanager
def running_nodes(
    directories: Sequence[Path], *options: str, **variables: str
) -> Iterator[list[str]]:
    """Addresses of a node in each directory."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(running_node(directory, *options, **variables)).address
            for directory in directories
        ]


def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
