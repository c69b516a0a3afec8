# SPDX-License-Identifier: Apache-2.0
"""Memory in which engines show frontends the nodes that they found at run time."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

NODE_BOARD_VARIABLE = "ATTN_OFFLOAD_NODE_BOARD"
#: Of 64 nodes with the longest host names and the longest token, in base64.
_SLOT_BYTES = 1 << 15


class FoundNode(msgspec.Struct, frozen=True):
    """Address of a node, and what it asks for; see `LaunchedNode`."""

    address: str
    auth_token: bytes

    def __repr__(self) -> str:
        """Keep the token out of logs."""
        return f"FoundNode({self.address!r})"


class NodeBoard:
    """One slot per engine, in a memory file of the process that made it.

    It has no name, so no token is left on a disk; engines and API servers are children
    of its maker and find it by their environment.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def create(cls) -> NodeBoard:
        """Make an empty board that processes started from now on find."""
        board = cls(os.memfd_create("attn-offload-nodes"))
        os.fchmod(board._fd, 0o600)
        os.environ[NODE_BOARD_VARIABLE] = f"/proc/{os.getpid()}/fd/{board._fd}"
        return board

    @classmethod
    def find(cls) -> NodeBoard | None:
        """Open the board of this deployment; None where nobody made one.

        Raises:
            OSError: The process that made it is gone.
        """
        path = os.environ.get(NODE_BOARD_VARIABLE)
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC)) if path else None

    def write(self, engine: int, nodes: Sequence[FoundNode]) -> None:
        """Show the nodes of an engine.

        Args:
            engine: Data-parallel index.
            nodes: All of them.

        Raises:
            ValueError: There is no room for so many nodes or tokens.
        """
        # Nodes of one pool ask for one token, which is longer than many addresses.
        by_token: dict[bytes, list[str]] = {}
        for node in nodes:
            by_token.setdefault(node.auth_token, []).append(node.address)
        slot = msgspec.json.encode(list(by_token.items()))
        if len(slot) > _SLOT_BYTES:
            raise ValueError(
                f"{len(nodes)} memory nodes with {len(by_token)} tokens were found, "
                f"which take {len(slot):,} bytes to show to API servers. Allowed: "
                f"{_SLOT_BYTES:,} bytes, enough for 64 nodes of one pool. Use fewer "
                "nodes, or shorter names of their hosts."
            )
        os.pwrite(self._fd, slot.ljust(_SLOT_BYTES, b"\0"), engine * _SLOT_BYTES)

    def read(self) -> list[FoundNode]:
        """Return the nodes of all engines."""
        slots = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        begins = range(0, len(slots), _SLOT_BYTES)
        parts = [_nodes(slots[begin : begin + _SLOT_BYTES]) for begin in begins]
        return [node for part in parts for node in part]


def _nodes(slot: bytes) -> list[FoundNode]:
    try:
        pools = msgspec.json.decode(
            slot.rstrip(b"\0"), type=list[tuple[bytes, list[str]]]
        )
    except msgspec.DecodeError:
        return []  # Empty, or just being written.
    return [FoundNode(address, token) for token, found in pools for address in found]
