# SPDX-License-Identifier: Apache-2.0
"""Memory nodes that demand a token, on a host of their own."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from harness.network_namespace import RemoteHost
from node_process import NodeProcess

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.transport.trust import Credentials


class NodesOnHost:
    """Nodes of one host.

    Args:
        host: Where they run.
        directory: For their token and logs.

    Attributes:
        running: In the order in which they were started, also those that have ended.
        token_file: Their token, which every host of an engine needs.
    """

    def __init__(self, host: RemoteHost, directory: Path) -> None:
        self.running: list[NodeProcess] = []
        self.token_file = directory / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text("0123456789abcdef" * 4)
        self._host = host
        self._directory = directory

    def start(self, cpu: str) -> None:
        """Start one more, whose unwritten blocks hold NaN."""
        node = NodeProcess(
            f"{self._host.address}:0",
            self._directory / f"node-{len(self.running)}.log",
            *("--kv-cache-gib", "0.1", "--cpus", cpu),
            *("--auth-token-file", str(self.token_file)),
            prefix=self._host.command,
            ATTN_OFFLOAD_POISON_KV="1",
        )
        self.running.append(node)

    def num_sessions(self) -> int:
        """Sessions on all nodes that live."""
        alive = [node for node in self.running if node.process.poll() is None]
        return sum(self._num_sessions(node.address) for node in alive)

    def kill(self) -> None:
        """End all of them."""
        for node in self.running:
            node.kill()

    def _num_sessions(self, address: str) -> int:
        trust = Credentials(str(self.token_file))
        with closing(ControlClient(address, 5, trust)) as client:
            return len(client.stats().sessions)
