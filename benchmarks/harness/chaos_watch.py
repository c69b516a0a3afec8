# SPDX-License-Identifier: Apache-2.0
"""Watches a server's processes for leaks, and its log for recoveries."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from harness import faults
from harness.serve_process import ServeProcess

_INTERVAL_S = 0.05
_LOOKS_EVERY = 20
#: A node has buffers of its own once it served so long; what comes later is growth.
_WARM_UP_S = 10.0
#: A node grows by more than this at once only with a pool, whose pages are touched.
_POOL_MIB = 64.0


@dataclass
class NodeLife:
    """One node process; a restarted node is another one.

    Its memory is the anonymous resident part, without shared files and libraries. The
    whole pool counts: the benchmark touches its pages when it is opened.
    """

    seen_s: float
    last_s: float
    warm_mib: float | None = None
    last_mib: float = 0.0

    @property
    def growth_mib(self) -> float:
        """Growth since it was warm."""
        return 0.0 if self.warm_mib is None else self.last_mib - self.warm_mib


@dataclass
class Watch:
    """Looks at a server's processes and log in a thread.

    Args:
        server: The server to watch.

    Attributes:
        nodes: Node processes by process id.
        restored_s: Times at which the log said that the nodes are back.
    """

    server: ServeProcess
    nodes: dict[int, NodeLife] = field(default_factory=dict)
    restored_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._is_over.set()
        self._thread.join(10)

    def holdings(self) -> dict[str, tuple[int, int]]:
        """File descriptors and threads of every process, under stable names."""
        found: dict[str, tuple[int, int]] = {}
        server = psutil.Process(self.server.process.pid)
        nodes = faults.memory_nodes(server.pid)
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                is_node = process in nodes
                name = f"node {nodes.index(process)}" if is_node else process.name()
                while name in found:
                    name += "'"
                found[name] = process.num_fds(), process.num_threads()
        return found

    def _run(self) -> None:
        num_looks = num_restored = 0
        while not self._is_over.wait(_INTERVAL_S):
            count = self.server.log.read_bytes().count(faults.IS_BACK.encode())
            self.restored_s += [time.monotonic()] * (count - num_restored)
            num_restored = count
            if num_looks % _LOOKS_EVERY == 0:
                self._look()
            num_looks += 1

    def _look(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.server.footprint.look()
            for node in faults.memory_nodes(self.server.process.pid):
                self._measure(node.pid)

    def _measure(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        match = re.search(r"RssAnon:\s+(\d+) kB", status)
        if match is None:
            return  # it has just ended
        now = time.monotonic()
        life = self.nodes.setdefault(pid, NodeLife(now, now))
        used_mib = int(match[1]) / 1024
        if used_mib - life.last_mib > _POOL_MIB:
            # Its pool was opened, late where the other node was away for longer.
            life.seen_s, life.warm_mib = now, None
        life.last_s, life.last_mib = now, used_mib
        if life.warm_mib is None and now - life.seen_s > _WARM_UP_S:
            life.warm_mib = life.last_mib
