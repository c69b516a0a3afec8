# SPDX-License-Identifier: Apache-2.0
"""What a memory node says that it is."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_attn_offload import __version__
from vllm_attn_offload.protocol.messages import NodeInfo
from vllm_attn_offload.transport.address import Address, host_id


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """A node as its peers know it, for as long as its process lives.

    Args:
        name: Label of its metrics.
        device: What it runs on, as shown to users.
        kernel: Name of the kernel that attends.
        isa: Instructions that the kernel was compiled for; "": it has no such choice.
        unix_path: Absolute path of a Unix socket where it listens; "": none.
    """

    name: str
    device: str
    kernel: str
    isa: str
    unix_path: str
    instance: str = field(default_factory=lambda: secrets.token_hex(16))

    def info(self, kv_bytes_total: int, kv_bytes_free: int) -> NodeInfo:
        """Describe the node with its budget for KV blocks, and what is free of it."""
        return NodeInfo(
            device=self.device,
            attention_kernel=self.kernel,
            pid=os.getpid(),
            kv_bytes_total=kv_bytes_total,
            kv_bytes_free=kv_bytes_free,
            name=self.name,
            version=__version__,
            isa=self.isa,
            instance=self.instance,
            host_id=host_id(),
            unix_path=self.unix_path,
        )


def default_name(addresses: Sequence[Address]) -> str:
    """Name a node after its host, and the port or socket where it listens first.

    Ports are known, so the addresses are those that were bound.

    Returns:
        What --name allows, too: 1 to 128 characters of printable ASCII. Others of the
        socket's name become "_".
    """
    host = socket.gethostname()
    ports = [each.port for each in addresses if not each.path]
    name = f"{host}:{ports[0]}" if ports else f"{host}/{Path(addresses[0].path).stem}"
    return re.sub(r"[^ -~]", "_", name)[:128]


def unix_path(addresses: Sequence[Address]) -> str:
    """Absolute path of the first Unix socket; "": none, or none that UTF-8 can tell."""
    paths = [os.path.abspath(each.path) for each in addresses if each.path]
    return paths[0] if paths and paths[0].isprintable() else ""
