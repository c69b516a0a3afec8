# SPDX-License-Identifier: Apache-2.0
"""What the engine does with a memory node that it starts or finds at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class LaunchedNode(Protocol):
    """A node behind a `Launch`: a process of this host, or one that Ray placed."""

    @property
    def address(self) -> str:
        """Where it listens."""

    @property
    def pid(self) -> int | None:
        """Process id; None where the process is not of this host."""

    @property
    def auth_token(self) -> bytes:
        """Token that it asks for; empty: what the engine's own credentials hold."""

    def kill(self) -> None:
        """End it at once, where it belongs to this engine.

        Raises:
            MemoryNodeError: It has not ended.
        """

    def request_stop(self) -> None:
        """Ask it to end, without waiting, where it belongs to this engine."""

    def stop(self) -> None:
        """End it, where it belongs to this engine. Safe to call twice.

        Raises:
            MemoryNodeError: It has not ended.
        """


#: Starts or finds a node, with a budget in GiB; None for the one that was chosen for
#: it. Called again whenever it was lost.
Launch = Callable[[float | None], LaunchedNode]
