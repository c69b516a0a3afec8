# SPDX-License-Identifier: Apache-2.0
"""The exceptions that cross module boundaries."""

from __future__ import annotations


class MemoryNodeError(RuntimeError):
    """A memory node could not be used: unreachable, lost, or it refused a request.

    Args:
        node: Address of the node, as the user wrote it.
        cause: One or two sentences: what happened and what to do.
    """

    def __init__(self, node: str, cause: str) -> None:
        super().__init__(f"Memory node {node}: {cause}")
        self.node = node
        self.cause = cause


class ProtocolError(RuntimeError):
    """A peer sent something that the protocol does not allow."""
