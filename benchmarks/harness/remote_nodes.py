# SPDX-License-Identifier: Apache-2.0
"""Memory nodes of a second host, which is a network namespace of this one."""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness.memory_node import NodeProcess
from harness.network_namespace import RemoteHost, remote_host
from harness.processes import READY_FD, ManagedProcess

RELAY = Path(__file__).with_name("slow_link.py")


class RemoteNodes:
    """Nodes that demand a token, each behind a link of adjustable length.

    Args:
        host: Where they run.
        token_file: Their token.
        log: Their output is appended to it.
        stack: Ends what is started here.
    """

    def __init__(
        self, host: RemoteHost, token_file: Path, log: Path, stack: ExitStack
    ) -> None:
        self.host = host
        self._token_file = token_file
        self._log = log
        self._stack = stack
        self._relays: list[ManagedProcess] = []

    def start(self, kv_cache_gib: float, cpus: str, is_relayed: bool) -> dict[str, Any]:
        """Start one more node.

        Args:
            kv_cache_gib: Size of its pool.
            cpus: Where it computes.
            is_relayed: It is reached through a relay that ``delay`` adjusts.

        Returns:
            Its ``address`` for ``memory_nodes``, and the ``auth_token_file``.
        """
        node = NodeProcess(
            f"{self.host.address}:0",
            self._log,
            *("--kv-cache-gib", str(kv_cache_gib), "--cpus", cpus),
            *("--auth-token-file", str(self._token_file)),
            prefix=self.host.command,
        )
        self._stack.callback(node.stop)
        address = self._relay(node.address) if is_relayed else node.address
        return {"address": address, "auth_token_file": str(self._token_file)}

    def delay(self, one_way_ms: float) -> None:
        """Set the latency that is added to every relayed link."""
        for relay in self._relays:
            relay.tell(str(one_way_ms))

    def _relay(self, address: str) -> str:
        """Start a relay to a node; returns where it listens."""
        command = (sys.executable, RELAY, READY_FD, address)
        relay = ManagedProcess(f"the relay to {address}", command, self._log)
        self._stack.callback(relay.stop)
        self._relays.append(relay)
        return relay.wait_until_ready()


@contextmanager
def remote_nodes(log: Path) -> Iterator[RemoteNodes]:
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
