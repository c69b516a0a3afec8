# SPDX-License-Identifier: Apache-2.0
"""The requests of a deployment, by their means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """Mean request and the limits of a step.

    Attributes:
        context: Cached tokens that a decode step of a request reads.
        prompt: Prompt tokens.
        output: Generated tokens.
        prefill: "local" (on the compute devices) or "none" (elsewhere, as in Lamina's
            evaluation).
        slo_tbt_s: Bound on the time between tokens in seconds; None: no bound.
        max_batch: Bound on the requests of one engine; None: memory is the bound.
    """

    context: float
    prompt: float
    output: float
    prefill: str = "local"
    slo_tbt_s: float | None = None
    max_batch: int | None = None
