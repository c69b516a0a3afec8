# SPDX-License-Identifier: Apache-2.0
"""Notes the loss of a memory node."""

from __future__ import annotations

from types import TracebackType

from vllm_attn_offload.errors import MemoryNodeError


class LossGuard:
    """Context of everything that talks to nodes: keeps the first loss in ``loss``.

    One object for all layers, because a step enters it twice a layer.

    Args:
        tolerate: Let the step go on; otherwise the loss is raised, again and again.
    """

    def __init__(self, *, tolerate: bool) -> None:
        self.loss: MemoryNodeError | None = None
        self._tolerate = tolerate

    def is_lost(self) -> bool:
        """Return True if a node was lost before.

        Raises:
            MemoryNodeError: The loss, where it is not tolerated.
        """
        if self.loss is not None and not self._tolerate:
            raise self.loss
        return self.loss is not None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, MemoryNodeError):
            return False
        self.loss = error
        return self._tolerate

    def forget_frames(self) -> None:
        """Let go of the frames that the loss refers to.

        What is shared with a node would stay mapped until a garbage collection.
        """
        error: BaseException | None = self.loss
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
