# SPDX-License-Identifier: Apache-2.0
"""Memory that bounds the requests of an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capacity:
    """Memory for requests, and what each of them takes of it.

    Attributes:
        limit: "memory" (of the KV, and of recurrent states beside it) or "states" (of
            recurrent states alone).
        budget_bytes: Memory; negative if the weights exceed it.
        request_bytes: Of it, for one request; 0: no bound.
    """

    limit: str
    budget_bytes: float
    request_bytes: float

    @property
    def num_requests(self) -> float:
        """Whole requests that fit, infinitely many where they take nothing."""
        if not self.request_bytes:
            return math.inf
        return max(self.budget_bytes // self.request_bytes, 0)

    def __str__(self) -> str:
        left = f"{max(self.budget_bytes, 0) / 1e9:.1f} GB are left for "
        left += "recurrent states" if self.limit == "states" else "requests"
        return f"{left}, one request takes {self.request_bytes / 1e9:.2f} GB"
