# SPDX-License-Identifier: Apache-2.0
"""Exceptions that cross module boundaries."""

from __future__ import annotations


class MemoryNodeError(RuntimeError):
    """A memory node could not be used: unreachable, lost, or it refused a request.

    Args:
        node: Address of the node in the user's spelling.
        cause: One or two sentences that say what happened and what to do.
    """

    def __init__(self, node: str, cause: str) -> None:
        super().__init__(f"Memory node {node}: {cause}")
        self.node = node
        self.cause = cause


class ProtocolError(RuntimeError):
    """A peer sent something that the protocol does not allow."""
