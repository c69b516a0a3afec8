# SPDX-License-Identifier: Apache-2.0
"""A memory node in a process of its own, started as users start it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.processes import READY_FD, ManagedProcess

COMMAND = Path(sys.executable).with_name("vllm-memory-node")


class NodeProcess(ManagedProcess):
    """``vllm-memory-node``, listening when constructed.

    Args:
        listen: Value of ``--listen``.
        log: File that its output is appended to; None: the terminal.
        *options: Further options.
        prefix: Put in front of the command.
        command: Runs in place of the installed command.
        **variables: Added to its environment.

    Attributes:
        address: Where it listens.
        start_s: Seconds until it did.

    Raises:
        ProcessError: It did not start.
    """

    def __init__(
        self,
        listen: str,
        log: Path | None,
        *options: str,
        prefix: tuple[str, ...] = (),
        command: Sequence[str | Path] = (COMMAND,),
        **variables: str,
    ) -> None:
        started = time.monotonic()
        place = ("--listen", listen, "--ready-fd", READY_FD)
        super().__init__(
            f"the memory node on {listen}",
            [*prefix, *command, *place, *options],
            log,
            variables=variables,
        )
        try:
            self.address = self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        self.start_s = time.monotonic() - started

    def log(self) -> str:
        """The output of the node so far."""
        assert self._log_path is not None
        return self._log_path.read_text()


@contextmanager
def running_node(
    directory: Path, *options: str, **keywords: Any
) -> Iterator[NodeProcess]:
    """A node on a Unix socket in a directory, with its log, ended with the context.

    Args:
        directory: An existing one.
        *options: Of the command.
        **keywords: As of `NodeProcess`.
    """
    process = NodeProcess(
        f"unix:{directory / 'node.sock'}", directory / "node.log", *options, **keywords
    )
    try:
        yield process
    finally:
        process.kill()
