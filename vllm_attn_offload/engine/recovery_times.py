# SPDX-License-Identifier: Apache-2.0
"""One recovery from a lost node: its cause, and when each part of it ended."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.worker.spans import Attributes, Spans


@dataclass(slots=True)
class RecoveryTimes:
    """Times are ``time.monotonic``, 0.0 of what has not happened.

    The step in flight is ``dropped`` in the engine's thread while another one
    ``reopened`` the pool; with both, workers are ``attached``.
    """

    error: MemoryNodeError
    lost_s: float
    dropped_s: float = 0.0
    reopened_s: float = 0.0
    num_tokens: int = 0

    def seconds(self, attached_s: float) -> float:
        """Time that it took, without that in which the engine had nothing to do."""
        idle_s = 0.0 if self.num_tokens else max(0.0, self.dropped_s - self.reopened_s)
        return attached_s - self.lost_s - idle_s

    def describe(self, attached_s: float, generation: int) -> str:
        """Say how long everything took."""
        return (
            f"the memory nodes are back after {self.seconds(attached_s):.2f} s "
            f"(generation {generation}; the step in flight ended after "
            f"{self.dropped_s - self.lost_s:.2f} s, the pool was open after "
            f"{self.reopened_s - self.lost_s:.2f} s)"
        )

    def write(
        self, spans: Spans, ended_s: float, generation: int, failure: str = ""
    ) -> None:
        """Write a trace of the recovery, with a span of each part that was reached.

        Args:
            spans: Where to.
            ended_s: When workers were attached, or the engine gave up.
            generation: Of the sessions that are in use.
            failure: Why the engine gave up; "": it goes on.
        """
        attributes: Attributes = {
            "node": self.error.node,
            "cause": self.error.cause,
            "seconds": ended_s - self.lost_s if failure else self.seconds(ended_s),
            "recomputed_tokens": self.num_tokens,
            "generation": generation,
        }
        whole = spans.write("recovery", self.lost_s, ended_s, attributes, error=failure)
        parts = {
            "lost": (self.lost_s, self.dropped_s),
            "reopened": (self.lost_s, self.reopened_s),
        }
        if not failure:
            parts["attached"] = max(self.dropped_s, self.reopened_s), ended_s
        for name, (began_s, part_ended_s) in parts.items():
            if part_ended_s:
                spans.write(f"recovery.{name}", began_s, part_ended_s, {}, parent=whole)
