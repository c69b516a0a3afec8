# SPDX-License-Identifier: Apache-2.0
"""Finds the processes and shared memory of one server among all others."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import psutil


class Footprint:
    """Processes of a server and the shared memory that they map.

    A file in /dev/shm does not tell which process made it, and other engines come and
    go. Files that a process of this server maps at any ``look`` belong to it.

    Args:
        pid: The server. Its descendants count, even if their parent has died.
    """

    def __init__(self, pid: int) -> None:
        self.processes = {psutil.Process(pid)}
        self.shared_memory: set[str] = set()

    def look(self) -> None:
        """Add what there is now."""
        for process in list(self.processes):
            with suppress(psutil.NoSuchProcess):
                self.processes.update(process.children(recursive=True))
        for process in self.processes:
            with suppress(OSError):  # it has ended
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                self.shared_memory.update(re.findall(r"/dev/shm/\S+", maps))

    def left(self) -> list[str]:
        """Processes that still run and shared memory that is still there."""
        _, alive = psutil.wait_procs(self.processes, timeout=0)
        left = []
        for process in alive:
            with suppress(psutil.NoSuchProcess):  # it ends just now
                left.append(f"process {process.pid} {process.name()}")
        return left + sorted(path for path in self.shared_memory if Path(path).exists())

    def remove(self) -> None:
        """Kill and unlink what is left."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes, timeout=10)
        for path in self.shared_memory:
            Path(path).unlink(missing_ok=True)
