# SPDX-License-Identifier: Apache-2.0
"""A child process that is started, awaited and stopped, with a deadline for each."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

#: Stands in a command for the file descriptor of a pipe.
READY_FD = "{ready-fd}"
_POLL_S = 0.5
_TAIL_LINES, _ERROR_LINES = 60, 20
_ERROR = re.compile(" ERROR |Error: ")
_EXIT_NOISE = re.compile(r"nanobind: | - (leaked|\.\.\. skipped)|See https://nanobind")


class ProcessError(RuntimeError):
    """A process did not start, answer or end as it should."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_tail(log: Path) -> str:
    """The end of a log and the errors before it, where vLLM states causes."""
    text = log.read_text("utf-8", "replace")
    # Triton's bindings list leaks when any process ends; never the cause.
    lines = [line for line in text.splitlines() if not _EXIT_NOISE.match(line)]
    errors = [line for line in lines[:-_TAIL_LINES] if _ERROR.search(line)]
    return "\n".join([*errors[-_ERROR_LINES:], *lines[-_TAIL_LINES:]])


class ManagedProcess:
    """A process, started when constructed.

    It is ready once it has written a line to `READY_FD`, or, without that, once
    ``health_url`` answers with status 200.

    Args:
        name: Names the process in error messages.
        command: With `READY_FD` where the descriptor of the pipe belongs.
        log: File that its output is appended to; None: the terminal.
        health_url: Polled until the process is ready.
        variables: Added to the environment.
        pass_fds: Further file descriptors that it inherits.
        own_session: Keep Ctrl-C from it, because the caller stops it then.

    Attributes:
        process: The running process; its stdin is a pipe.
    """

    start_timeout_s = 60.0
    stop_timeout_s = 10.0

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path | None = None,
        *,
        health_url: str = "",
        variables: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
        own_session: bool = False,
    ) -> None:
        self.name, self._log_path, self._health_url = name, log, health_url
        self._pipe, write = os.pipe()
        self._unread = b""
        sink = log.open("ab") if log else None
        try:
            self.process = subprocess.Popen(
                [str(write) if part == READY_FD else part for part in command],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                text=True,
                pass_fds=(write, *pass_fds) if READY_FD in command else pass_fds,
                env=os.environ | (variables or {}),
                start_new_session=own_session,
            )
        finally:
            os.close(write)
            if sink:
                sink.close()

    def wait_until_ready(self, on_poll: Callable[[], object] = lambda: None) -> str:
        """Wait for the first line, or for ``health_url``, at most ``start_timeout_s``.

        Args:
            on_poll: Called between two looks at ``health_url``.

        Returns:
            The line; empty with ``health_url``.

        Raises:
            ProcessError: The process ended, or the time is over.
        """
        if not self._health_url:
            return self.read_line(self.start_timeout_s)
        deadline = time.monotonic() + self.start_timeout_s
        while not self._is_healthy():
            if self.process.poll() is not None:
                raise self._error(f"ended with status {self.process.returncode}")
            if time.monotonic() > deadline:
                raise self._error(f"was not ready within {self.start_timeout_s:g} s")
            on_poll()
            time.sleep(_POLL_S)
        return ""

    def read_line(self, timeout_s: float) -> str:
        """Return the next line that the process writes to `READY_FD`.

        Raises:
            ProcessError: The process ended, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if select.select([self._pipe], [], [], _POLL_S)[0]:
                data = os.read(self._pipe, 1 << 16)
                if not data:
                    break
                self._unread += data
            elif self.process.poll() is not None:
                break
            elif time.monotonic() > deadline:
                raise self._error(f"did not answer within {timeout_s:g} s")
        line, _, self._unread = self._unread.partition(b"\n")
        if not line:
            raise self._error("ended early")
        return line.decode().strip()

    def tell(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def finish(self, timeout_s: float) -> None:
        """Wait until it ends by itself.

        Raises:
            ProcessError: It failed, or the time is over; then it was killed.
        """
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise self._error(f"did not end within {timeout_s:g} s") from None
        self._close_pipes()
        if self.process.returncode:
            raise self._error(f"ended with status {self.process.returncode}")

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and SIGKILL if it does not end in ``stop_timeout_s``.

        Returns:
            The exit status: that of SIGKILL where the signal was not enough.
        """
        self.process.send_signal(signum)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.stop_timeout_s)
        return self.kill()

    def kill(self) -> int:
        """End it at once, whatever happened before; returns the exit status."""
        self.process.kill()
        self._close_pipes()
        return self.process.wait(self.stop_timeout_s)

    def log_tail(self) -> str:
        """The end of its output, for messages."""
        return log_tail(self._log_path) if self._log_path else ""

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(self._health_url, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _error(self, what: str) -> ProcessError:
        where = self._log_path or "the messages above"
        return ProcessError(f"{self.name} {what}. See {where}:\n{self.log_tail()}")

    def _close_pipes(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
