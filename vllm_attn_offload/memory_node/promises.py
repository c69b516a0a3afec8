# SPDX-License-Identifier: Apache-2.0
"""Memory that the memory nodes of this host have promised to engines.

Blocks take memory when they are first written, so that of a node that runs may still
look free. A promise is the name of an abstract Unix socket: the kernel shows it to
every user, and forgets it with its process. Containers have lists of their own. Who
invents promises only makes others start with less, as who takes the memory does.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_REGISTRY = "vllm-memory-node"
_LIST = Path("/proc/self/net/unix")
_POLL_S = 0.02


class Promises:
    """Promises of all nodes that share a network namespace.

    Args:
        registry: Common beginning of their names.
    """

    def __init__(self, registry: str = _REGISTRY) -> None:
        self._registry = registry
        self._name = re.compile(
            rf"@{re.escape(registry)}/([\w-]+)/(\d+)/(\d+)/(\d+)/(\d+)$"
        )

    @contextlib.contextmanager
    def lock(self, timeout_s: float = 5.0) -> Iterator[None]:
        """Keep other nodes from promising meanwhile.

        Without the lock in time it goes on: a stranger may hold it for ever.

        Raises:
            OSError: There are no Unix sockets here.
        """
        deadline = time.monotonic() + timeout_s
        with socket.socket(socket.AF_UNIX) as sock:
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):  # somebody has it
                    sock.bind(f"\0{self._registry}/lock")
                    break
                time.sleep(_POLL_S)
            yield

    def add(self, device: str, num_bytes: int) -> socket.socket:
        """Promise memory of this process until the result is closed.

        Args:
            device: ``cpu``, or what tells one GPU of the host from another.
            num_bytes: Memory that the process does not hold yet.

        Raises:
            OSError: There are no Unix sockets here.
        """
        resident = psutil.Process().memory_info().rss
        place = f"{device}/{_pid_namespace()}/{os.getpid()}"
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"\0{self._registry}/{place}/{num_bytes}/{resident}")
        return sock

    def promised_bytes(self, device: str) -> int:
        """Memory of a device that is promised, touched or not.

        Raises:
            OSError: The kernel does not tell.
        """
        return sum(promise.num_bytes for promise in self._list(device))

    def untouched_bytes(self) -> int:
        """Host memory that is promised and looks free.

        Raises:
            OSError: The kernel does not tell.
        """
        return sum(promise.untouched_bytes() for promise in self._list("cpu"))

    def _list(self, device: str) -> Iterator[_Promise]:
        for line in _LIST.read_text(errors="replace").splitlines():
            match = self._name.search(line)
            if match and match[1] == device:
                yield _Promise(*map(int, match.groups()[1:]))


@dataclass(frozen=True, slots=True)
class _Promise:
    pid_namespace: int
    pid: int
    num_bytes: int
    resident_bytes: int  # of the process when it promised

    def untouched_bytes(self) -> int:
        if self.pid_namespace != _pid_namespace():
            return self.num_bytes  # Here its number is that of another process.
        try:
            resident = psutil.Process(self.pid).memory_info().rss
        except psutil.Error:
            return self.num_bytes  # The kernel hides processes of other users.
        grown = max(0, resident - self.resident_bytes)
        return max(0, self.num_bytes - grown)


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
