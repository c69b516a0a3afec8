# SPDX-License-Identifier: Apache-2.0
"""Memory nodes of a second host, which is a network namespace of this one."""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from network_namespace import RemoteHost, remote_host

NODE = Path(sys.executable).with_name("vllm-memory-node")
RELAY = Path(__file__).with_name("slow_link.py")
START_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 10.0


class RemoteNodes:
    """Nodes that demand a token, each behind a link of adjustable length.

    Args:
        host: Where they run.
        token_file: Their token.
        log: Takes their output.
        stack: Ends what is started here.
    """

    def __init__(
        self, host: RemoteHost, token_file: Path, log: TextIO, stack: ExitStack
    ) -> None:
        self.host = host
        self._token_file = token_file
        self._log = log
        self._stack = stack
        self._relays: list[subprocess.Popen[str]] = []

    def start(self, kv_cache_gib: float, cpus: str, is_relayed: bool) -> dict[str, Any]:
        """Start one more node.

        Args:
            kv_cache_gib: Size of its pool.
            cpus: Where it computes.
            is_relayed: It is reached through a relay that ``delay`` adjusts.

        Returns:
            Its ``address`` for ``memory_nodes``, and the ``auth_token_file``.
        """
        command = [
            *(*self.host.command, str(NODE), "--listen", f"{self.host.address}:0"),
            *("--kv-cache-gib", str(kv_cache_gib), "--cpus", cpus),
            *("--auth-token-file", str(self._token_file), "--ready-fd"),
        ]
        address = self._launch(command)[1]
        if is_relayed:
            # The relay takes its arguments in the other order.
            relay, address = self._launch([sys.executable, str(RELAY)], address)
            self._relays.append(relay)
        return {"address": address, "auth_token_file": str(self._token_file)}

    def delay(self, one_way_ms: float) -> None:
        """Set the latency that is added to every relayed link."""
        for relay in self._relays:
            assert relay.stdin is not None
            relay.stdin.write(f"{one_way_ms}\n")
            relay.stdin.flush()

    def _launch(
        self, command: list[str], *arguments: str
    ) -> tuple[subprocess.Popen[str], str]:
        read, write = os.pipe()
        process = subprocess.Popen(
            [*command, str(write), *arguments],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=(write,),
        )
        os.close(write)
        self._stack.callback(_end, process)
        with os.fdopen(read) as ready:
            select.select([ready], [], [], START_TIMEOUT_S)
            address = ready.readline().strip()
        if not address:
            raise SystemExit(f"{command[0]} did not start. See {self._log.name}")
        return process, address


@contextmanager
def remote_nodes(log: TextIO) -> Iterator[RemoteNodes]:
    """A second host without nodes; they end with the context.

    Raises:
        SystemExit: This process may not make a network namespace.
    """
    with ExitStack() as stack:
        try:
            host = stack.enter_context(remote_host())
        except PermissionError as error:
            raise SystemExit(
                f"{error}. Remote nodes are measured in a network namespace, which "
                "root may make. Run this as root, or without the option."
            ) from error
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        token_file = Path(folder, "token")
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32), "utf-8")
        yield RemoteNodes(host, token_file, log, stack)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)
