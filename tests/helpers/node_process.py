# SPDX-License-Identifier: Apache-2.0
"""A real memory node in a process of its own, started as users start it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = Path(sys.executable).with_name("vllm-memory-node")
START_TIMEOUT_S = 30.0


class NodeProcess:
    """``vllm-memory-node`` with its log in a file.

    Args:
        listen: Value of ``--listen``.
        log: File that takes its output.
        *options: Further options.
        prefix: Put in front of the command.
        **variables: Added to its environment.
    """

    def __init__(
        self,
        listen: str,
        log: Path,
        *options: str,
        prefix: tuple[str, ...] = (),
        **variables: str,
    ) -> None:
        self._log = log
        ready_read, ready_write = os.pipe()
        started = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *prefix,
                    COMMAND,
                    *("--listen", listen, "--ready-fd", str(ready_write)),
                    *options,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(ready_write,),
                env=os.environ | variables,
            )
        os.close(ready_write)
        select.select([ready_read], [], [], START_TIMEOUT_S)
        self.address = os.read(ready_read, 4096).decode().strip()
        self.start_s = time.monotonic() - started
        os.close(ready_read)
        assert self.address, self.log()

    def log(self) -> str:
        """What the node wrote so far."""
        return self._log.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(10)

    def kill(self) -> None:
        """End it whatever happened before."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running_node(directory: Path, *options: str) -> Iterator[NodeProcess]:
    """A node on a Unix socket in a directory, ended with the context."""
    process = NodeProcess(
        f"unix:{directory / 'node.sock'}", directory / "node.log", *options
    )
    try:
        yield process
    finally:
        process.kill()


def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
