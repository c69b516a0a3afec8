# SPDX-License-Identifier: Apache-2.0
"""Memory in which engines show frontends the nodes that they found at run time."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_attn_offload.engine.slot_board import SlotBoard

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


class NodeBoard(SlotBoard):
    """Shows the nodes of every engine."""

    variable = NODE_BOARD_VARIABLE
    file_name = "attn-offload-nodes"
    slot_bytes = _SLOT_BYTES

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
        self._write_slot(engine, slot)

    def read(self) -> list[FoundNode]:
        """Return the nodes of all engines."""
        parts = map(_nodes, self._read_slots())
        return [node for part in parts for node in part]


def _nodes(slot: bytes) -> list[FoundNode]:
    try:
        pools = msgspec.json.decode(slot, type=list[tuple[bytes, list[str]]])
    except msgspec.DecodeError:
        return []  # Empty, or just being written.
    return [FoundNode(address, token) for token, found in pools for address in found]
