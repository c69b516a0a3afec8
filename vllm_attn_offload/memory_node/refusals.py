# SPDX-License-Identifier: Apache-2.0
"""How often a node refused a peer, a request or a frame, and why."""

from __future__ import annotations

import threading
from collections import Counter

from vllm_attn_offload.protocol.frames import FrameKind
from vllm_attn_offload.protocol.reasons import (
    INVALID_FRAMES,
    REFUSED_REASONS,
    InvalidFrame,
    RefusedReason,
)

#: Stands for the kind of a frame whose header is wrong.
NO_KIND = 0
_INVALID_FRAMES: dict[int, InvalidFrame] = {
    NO_KIND: "header",
    FrameKind.STEP.value: "step",
    FrameKind.LAYER.value: "layer",
}


class Refusals:
    """Counts by reason since the node was made; safe for concurrent callers."""

    def __init__(self) -> None:
        self._refused: Counter[RefusedReason] = Counter()
        self._invalid_frames: Counter[InvalidFrame] = Counter()
        self._lock = threading.Lock()

    @property
    def refused(self) -> dict[RefusedReason, int]:
        """Refused connections and requests."""
        with self._lock:
            return {reason: self._refused[reason] for reason in REFUSED_REASONS}

    @property
    def invalid_frames(self) -> dict[InvalidFrame, int]:
        """Data channels that were closed for what a frame held."""
        with self._lock:
            return {reason: self._invalid_frames[reason] for reason in INVALID_FRAMES}

    def count(self, reason: RefusedReason) -> None:
        """Count a refused connection or request."""
        with self._lock:
            self._refused[reason] += 1

    def count_frame(self, kind: int) -> None:
        """Count a frame that the protocol does not allow; ``NO_KIND``: its header."""
        reason = _INVALID_FRAMES.get(kind, "kind")
        with self._lock:
            self._invalid_frames[reason] += 1
