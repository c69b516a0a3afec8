# SPDX-License-Identifier: Apache-2.0
"""A process that says through a pipe where it listens."""

from __future__ import annotations

import os
import select
import subprocess
from typing import TextIO

#: Stands in a command for the file descriptor of the pipe.
READY_FD = "{ready-fd}"
START_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 10.0


class ReadyProcess:
    """Started, and listening when constructed.

    Args:
        command: With `READY_FD` where the descriptor belongs.
        log: Takes its output; None: the terminal.

    Raises:
        SystemExit: It ended, or said nothing in time.
    """

    def __init__(self, command: list[str], log: TextIO | None = None) -> None:
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [str(write) if part == READY_FD else part for part in command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            pass_fds=(write,),
        )
        os.close(write)
        with os.fdopen(read) as ready:
            is_ready = select.select([ready], [], [], START_TIMEOUT_S)[0]
            self.address = ready.readline().strip() if is_ready else ""
        if not self.address:
            self.stop()
            where = log.name if log else "the messages above"
            raise SystemExit(f"{command[0]} did not start. See {where}.")

    def tell(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Ask it to end, and end it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
