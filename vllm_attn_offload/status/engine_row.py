# SPDX-License-Identifier: Apache-2.0
"""What an engine's ``/metrics`` say of its recoveries and its pool."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine behind a server; None: its ``/metrics`` do not say.

    Attributes:
        generation: Times that the pool's sessions were opened again.
        recovering: Whether a memory node is missing now.
        recoveries: Losses that the engine recovered from.
        recovery_s: Time that all of them took.
        last_recovery_s: Time that the last one took.
        recomputed_tokens: Tokens that were computed again.
        pool_blocks: KV blocks that the scheduler has.
    """

    model_name: str
    engine_index: str
    generation: float | None = None
    recovering: float | None = None
    recoveries: float | None = None
    recovery_s: float | None = None
    last_recovery_s: float | None = None
    recomputed_tokens: float | None = None
    pool_blocks: float | None = None
