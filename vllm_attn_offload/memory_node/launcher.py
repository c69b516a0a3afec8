# SPDX-License-Identifier: Apache-2.0
"""Starts a memory node as a child process and makes sure that it ends with us."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.capacity import available_host_bytes
from vllm_attn_offload.memory_node.memory_claim import unpromised_host_bytes
from vllm_attn_offload.transport.address import check_directory

__all__ = [
    "MemoryNodeProcess",
    "available_host_bytes",
    "local_address",
    "local_name",
    "unpromised_host_bytes",
]

_MODULE = "vllm_attn_offload.memory_node.main"
_SOCKET = "sock"  # short, because a socket's path must be
_STOP_TIMEOUT_S = 5.0
_STDERR = 2
_MAX_SAID_BYTES = 1 << 20
#: In front of what a node says: its logger's prefix, or that of wrong options.
_PREFIX = re.compile(
    r"\(MemoryNode pid=\d+\) [A-Z]+ \S+ \S+ |vllm-memory-node: error: "
)


def local_address(directory: Path) -> str:
    """Address of the node that ``MemoryNodeProcess`` starts in a directory."""
    return f"unix:{directory / _SOCKET}"


def local_name(directory: Path) -> str:
    """Name of the node in a directory that no other deployment of the host uses.

    Returns:
        Of ``attn-offload-ID-ENGINE-NODE`` (see ``run_dir``): HOST/local-ID-ENGINE-NODE.
    """
    unique = directory.name.removeprefix("attn-offload-")
    return f"{socket.gethostname()}/local-{unique}"


class MemoryNodeProcess:
    """A memory node of this host, on a Unix socket in a private directory or on TCP.

    The child watches a pipe that this process holds: it ends when this process does,
    however that happens.

    Args:
        directory: Made for the socket (mode 0700) and removed by ``stop``.
        kv_cache_gib: Budget of the node; None leaves its default.
        cpus: CPUs of the node as ``--cpus`` takes them; empty leaves its default.
        startup_timeout_s: Deadline for the node to announce itself.
        device: What holds the blocks, as ``--device`` takes it.
        auth_token_file: The node asks for the token in it; empty: for none.
        listen: Listen at this HOST:PORT instead, where port 0 is any free one; the
            directory is not used.
        auth_token: The token itself, written to no disk, in place of a file.
        name: Label of its metrics, as ``--name`` takes it; empty leaves its default.

    Raises:
        MemoryNodeError: The node could not be started, ended, or did not announce
            itself in time; nothing of it is left.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        kv_cache_gib: float | None,
        cpus: str,
        startup_timeout_s: float,
        device: str = "cpu",
        auth_token_file: str = "",
        listen: str = "",
        auth_token: bytes = b"",
        name: str = "",
    ) -> None:
        assert listen or directory
        self._directory = None if listen else directory
        self.address = listen or local_address(cast(Path, directory))
        self.auth_token = auth_token
        self._parent_write = -1
        self._process: subprocess.Popen[bytes] | None = None
        options = ["--listen", self.address, "--device", device]
        if kv_cache_gib is not None:
            # All digits: a node that replaces another must hold the same to the byte.
            options += ["--kv-cache-gib", repr(kv_cache_gib)]
        if cpus:
            options += ["--cpus", cpus]
        if name:
            options += ["--name", name]
        if auth_token_file:
            options += ["--auth-token-file", auth_token_file]
        try:
            if self._directory is not None:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                # Nothing is removed from one of another user.
                check_directory(self._directory)
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(self.stop)
                self._start(options, startup_timeout_s)
                on_failure.pop_all()
        except OSError as error:
            raise MemoryNodeError(
                self.address,
                f"it could not be started ({error}). A node needs a directory, a "
                "process and a few file descriptors. Free or allow more of what is "
                "missing (ulimit -a).",
            ) from error

    @property
    def pid(self) -> int:
        """Process id of the node."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """False once the node has ended."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End the node at once, also where it is stopped or hangs.

        Raises:
            MemoryNodeError: As ``stop``.
        """
        if self._process is not None:
            self._process.kill()
        self.stop()

    def request_stop(self) -> None:
        """Ask the node to end, without waiting for it."""
        if self._parent_write >= 0:
            os.close(self._parent_write)
            self._parent_write = -1

    def stop(self) -> None:
        """End the node and remove its directory. Safe to call twice.

        Raises:
            MemoryNodeError: It was killed, and the kernel has not ended it yet.
        """
        self.request_stop()
        if self._process is not None:
            self._process.terminate()
            self._end(self._process)
        if self._directory is None:
            return
        # Not rmtree, which needs a descriptor.
        with contextlib.suppress(OSError):
            (self._directory / _SOCKET).unlink(missing_ok=True)
            self._directory.rmdir()

    def _start(self, options: list[str], timeout_s: float) -> None:
        parent_read, self._parent_write = os.pipe()
        # Until it is ready a node talks into a file, whose end is part of the error.
        with (
            os.fdopen(parent_read, "rb"),
            _token_file(self.auth_token) as token_fds,
            os.fdopen(os.memfd_create("memory-node-start"), "rb") as said,
        ):
            ready_read, ready_write = os.pipe()
            with os.fdopen(ready_read, "rb"):
                with os.fdopen(ready_write, "wb"):
                    self._process = subprocess.Popen(
                        [
                            # -P: a checkout in the current directory is not what was
                            # installed.
                            *(sys.executable, "-P", "-m", _MODULE),
                            *options,
                            *_token_option(token_fds),
                            *("--ready-fd", str(ready_write)),
                            *("--parent-fd", str(parent_read)),
                        ],
                        stdin=subprocess.DEVNULL,
                        # Once it is ready it talks there (see main.py).
                        stdout=_STDERR,
                        stderr=said.fileno(),
                        pass_fds=(ready_write, parent_read, *token_fds),
                        # A Ctrl-C in the terminal must reach the engine only: it stops
                        # the node.
                        start_new_session=True,
                    )
                try:
                    self._wait_until_ready(self._process, ready_read, said, timeout_s)
                finally:
                    with contextlib.suppress(OSError):  # nobody reads our log
                        os.write(_STDERR, _read(said))

    def _wait_until_ready(
        self,
        process: subprocess.Popen[bytes],
        ready_fd: int,
        said: BinaryIO,
        timeout_s: float,
    ) -> None:
        # Not select: it takes no descriptor from 1,024 on.
        poller = select.poll()
        poller.register(ready_fd, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            raise MemoryNodeError(
                self.address,
                f"it was not ready within {timeout_s:g} s. Raise startup_timeout_s.",
            )
        announced = os.read(ready_fd, 4096).decode().strip()
        if not announced:
            code = self._end(process)
            raise MemoryNodeError(
                self.address,
                f"it ended at start with exit code {code}. It said: {_last_line(said)} "
                "In the engine's options, check kv_cache_gib (--kv-cache-gib there) "
                "and local_node_cpus (--cpus there).",
            )
        self.address = announced

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        """Return the exit code of the node, which is ended if it does not end."""
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_STOP_TIMEOUT_S)
            process.kill()
            return process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise MemoryNodeError(
                self.address,
                f"process {process.pid} was killed and has not ended within "
                f"{_STOP_TIMEOUT_S:g} s. Its memory is not free before.",
            ) from error


@contextlib.contextmanager
def _token_file(token: bytes) -> Iterator[tuple[int, ...]]:
    """Descriptor of a file that has no name and that only its user may read."""
    if not token:
        yield ()
        return
    with os.fdopen(os.memfd_create("memory-node-token"), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(token)
        file.flush()
        yield (file.fileno(),)


def _token_option(fds: tuple[int, ...]) -> list[str]:
    # The node opens it anew for every connection.
    return ["--auth-token-file", *(f"/proc/self/fd/{fd}" for fd in fds)] if fds else []


def _read(said: BinaryIO) -> bytes:
    # The node writes at the same position: it must not move.
    return os.pread(said.fileno(), _MAX_SAID_BYTES, 0)


def _last_line(said: BinaryIO) -> str:
    text = _read(said).decode(errors="replace").strip()
    line = _PREFIX.sub("", text.rpartition("\n")[2], count=1) or "nothing"
    return line if line.endswith((".", ")")) else f"{line}."
