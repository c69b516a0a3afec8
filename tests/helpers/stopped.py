# SPDX-License-Identifier: Apache-2.0
"""Processes that are there and do nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from node_process import eventually


def stop_process(pid: int) -> None:
    """Send SIGSTOP, and return when no thread runs any more."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    assert eventually(lambda: all(map(_is_stopped, tasks.iterdir())), 10)


def _is_stopped(task: Path) -> bool:
    # Behind the name, which is in parentheses and may hold anything.
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
