# SPDX-License-Identifier: Apache-2.0
"""Starts a memory node as a child process and makes sure that it ends with us."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

from vllm_attn_offload.errors import MemoryNodeError

_STOP_TIMEOUT_S = 5.0


def local_address(directory: Path) -> str:
    """Address of the node that ``MemoryNodeProcess`` starts in a directory."""
    return f"unix:{directory / 'node.sock'}"


class MemoryNodeProcess:
    """A local memory node on a Unix socket in a private directory.

    The child watches a pipe that this process holds: it ends when this process does,
    however that happens.

    Args:
        directory: Made for the socket (mode 0700) and removed by ``stop``.
        kv_cache_gib: Budget of the node; None leaves its default.
        cpus: CPUs of the node as ``--cpus`` takes them; empty leaves its default.
        startup_timeout_s: Deadline for the node to announce itself.
        device: What holds the blocks, as ``--device`` takes it.

    Raises:
        MemoryNodeError: The node ended or did not announce itself in time.
    """

    def __init__(
        self,
        directory: Path,
        *,
        kv_cache_gib: float | None,
        cpus: str,
        startup_timeout_s: float,
        device: str = "cpu",
    ) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.address = local_address(directory)
        ready_read, ready_write = os.pipe()
        parent_read, self._parent_write = os.pipe()
        command = [
            # -P: a checkout in the current directory is not what was installed.
            *(sys.executable, "-P", "-m", "vllm_attn_offload.memory_node.main"),
            *("--listen", self.address),
            *("--device", device),
            *("--ready-fd", str(ready_write)),
            *("--parent-fd", str(parent_read)),
        ]
        if kv_cache_gib is not None:
            # All digits: a node that replaces another must hold the same to the byte.
            command += ["--kv-cache-gib", repr(kv_cache_gib)]
        if cpus:
            command += ["--cpus", cpus]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=(ready_write, parent_read),
            # A Ctrl-C in the terminal must reach the engine only: it stops the node.
            start_new_session=True,
        )
        os.close(ready_write)
        os.close(parent_read)
        try:
            self._wait_until_ready(ready_read, startup_timeout_s)
        except MemoryNodeError:
            self.stop()
            raise
        finally:
            os.close(ready_read)

    @property
    def pid(self) -> int:
        """Process id of the node."""
        return self._process.pid

    def _wait_until_ready(self, ready_fd: int, timeout_s: float) -> None:
        readable, _, _ = select.select([ready_fd], [], [], timeout_s)
        if not readable:
            raise MemoryNodeError(
                self.address,
                f"it was not ready within {timeout_s:g} s. Raise startup_timeout_s.",
            )
        if not os.read(ready_fd, 4096):
            code = self._process.wait(_STOP_TIMEOUT_S)
            raise MemoryNodeError(
                self.address,
                f"it ended at start with exit code {code}. Its message is above; "
                "check kv_cache_gib and local_node_cpus.",
            )

    def kill(self) -> None:
        """End the node at once, also where it is stopped or hangs."""
        self._process.kill()
        self.stop()

    def request_stop(self) -> None:
        """Ask the node to end, without waiting for it."""
        if self._parent_write >= 0:
            os.close(self._parent_write)
            self._parent_write = -1

    def stop(self) -> None:
        """End the node and remove its directory. Safe to call twice."""
        self.request_stop()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_TIMEOUT_S)
        shutil.rmtree(self._directory, ignore_errors=True)
