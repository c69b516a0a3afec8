# SPDX-License-Identifier: Apache-2.0
"""A command on a pseudo-terminal, as a user has it before them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ROWS, _COLUMNS = 50, 160
_TIMEOUT_S = 30.0


class Terminal:
    """What a process wrote to its terminal so far, and its keys.

    Attributes:
        process: The command.
        written: Everything that it wrote, unless a test empties it.
    """

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.written = b""
        self._fd = fd

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self._fd, keys)

    def read_until(self, condition: Callable[[bytes], bool]) -> None:
        """Read until what was written meets a condition."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition(self.written):
            assert time.monotonic() < deadline, self.written.decode(errors="replace")
            if select.select([self._fd], [], [], 1.0)[0]:
                self.written += os.read(self._fd, 1 << 16)

    def end(self) -> int:
        """Read the rest and return the exit status."""
        while True:
            try:
                self.written += os.read(self._fd, 1 << 16)
            except OSError:  # EIO: the other side has ended.
                return self.process.wait(_TIMEOUT_S)


@contextmanager
def running_on_terminal(
    *command: str | Path, columns: int = _COLUMNS, rows: int = _ROWS
) -> Iterator[Terminal]:
    """Start a command in a session of its own; it is killed with the context."""
    ours, theirs = pty.openpty()
    size = struct.pack("HHHH", rows, columns, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    # Where these are set, they are believed instead of the terminal.
    sizes = ("COLUMNS", "LINES")
    environment = {k: v for k, v in os.environ.items() if k not in sizes}
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal,
        env={**environment, "TERM": "xterm-256color", "NO_COLOR": ""},
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def heed_ctrl_c() -> None:
    """Undo what a shell does to its background jobs, in a new process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    heed_ctrl_c()
