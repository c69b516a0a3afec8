# SPDX-License-Identifier: Apache-2.0
"""Losses of nodes in a row: the requests may be what kills them."""

from __future__ import annotations

import re

from vllm_attn_offload.errors import MemoryNodeError, NodeFailedError

#: Losses in a row without a decoded token.
_MAX_FRUITLESS = 5


class LossHistory:
    """Tells losses that come by themselves from those that the work causes.

    Times are ``time.monotonic``.

    Args:
        forget_after_s: What happens so long after a recovery is no row with it.
    """

    def __init__(self, forget_after_s: float) -> None:
        self._forget_after_s = forget_after_s
        self._recovered_s = 0.0
        self._failures: set[str] = set()
        #: Recoveries since a token was decoded.
        self.num_fruitless = 0

    @property
    def is_hopeless(self) -> bool:
        """True if another recovery would end as the last ones did."""
        return self.num_fruitless >= _MAX_FRUITLESS

    def note_progress(self) -> None:
        """Record that a step decoded a token since the last loss."""
        self.num_fruitless = 0
        self._failures.clear()

    def note_loss(self, now_s: float) -> None:
        """Begin a new row of losses, if the last one is long ago."""
        if self._served_for_long(now_s):
            self.num_fruitless = 0

    def note_attached(self) -> None:
        """Record that workers took new sessions."""
        self.num_fruitless += 1

    def note_recovery(self, now_s: float) -> None:
        """Record that the engine computes again."""
        self._recovered_s = now_s

    def failed_before(self, error: MemoryNodeError, now_s: float) -> bool:
        """Remember a failure; True where it is not the first of its kind."""
        if not isinstance(error, NodeFailedError):
            return False
        if self._served_for_long(now_s):
            self._failures.clear()
        # Sizes may differ, and another node that fails so means the work is the cause.
        kind = re.sub(r"\d+", "#", error.cause)
        is_known = kind in self._failures
        self._failures.add(kind)
        return is_known

    def _served_for_long(self, now_s: float) -> bool:
        return now_s - self._recovered_s > self._forget_after_s
