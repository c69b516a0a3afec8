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

    def __reduce__(self) -> tuple[type[MemoryNodeError], tuple[str, str]]:
        """Give pickle the arguments; it would call the class with the message."""
        return type(self), (self.node, self.cause)


class NodeDefectError(MemoryNodeError):
    """A memory node answers, but with a refusal or with what the protocol forbids.

    The same work gets the same answer again, on a node that is started again, too.
    """


class NodeFailedError(MemoryNodeError):
    """A memory node answers that it could not compute: memory may be short there.

    For a moment only, or the same work fails again.
    """


class RankSilentError(RuntimeError):
    """A rank of the engine does not answer; its host may be lost."""


class ProtocolError(RuntimeError):
    """A peer sent something that the protocol does not allow."""
