# SPDX-License-Identifier: Apache-2.0
"""Memory nodes of a second host, which is a network namespace of this one."""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from harness.network_namespace import RemoteHost, remote_host
from harness.processes import READY_FD, ReadyProcess

NODE = Path(sys.executable).with_name("vllm-memory-node")
RELAY = Path(__file__).with_name("slow_link.py")


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
        self._relays: list[ReadyProcess] = []

    def start(self, kv_cache_gib: float, cpus: str, is_relayed: bool) -> dict[str, Any]:
        """Start one more node.

        Args:
            kv_cache_gib: Size of its pool.
            cpus: Where it computes.
            is_relayed: It is reached through a relay that ``delay`` adjusts.

        Returns:
            Its ``address`` for ``memory_nodes``, and the ``auth_token_file``.
        """
        node = self._launch(
            *(*self.host.command, str(NODE), "--listen", f"{self.host.address}:0"),
            *("--kv-cache-gib", str(kv_cache_gib), "--cpus", cpus),
            *("--auth-token-file", str(self._token_file), "--ready-fd", READY_FD),
        )
        if is_relayed:
            node = self._launch(sys.executable, str(RELAY), READY_FD, node.address)
            self._relays.append(node)
        return {"address": node.address, "auth_token_file": str(self._token_file)}

    def delay(self, one_way_ms: float) -> None:
        """Set the latency that is added to every relayed link."""
        for relay in self._relays:
            relay.tell(str(one_way_ms))

    def _launch(self, *command: str) -> ReadyProcess:
        process = ReadyProcess(list(command), self._log)
        self._stack.callback(process.stop)
        return process


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
