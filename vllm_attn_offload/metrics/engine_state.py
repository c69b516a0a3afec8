# SPDX-License-Identifier: Apache-2.0
"""What an engine shows of its KV pool."""

from __future__ import annotations

import msgspec


class EngineState(msgspec.Struct, frozen=True):
    """Counters of an engine since its start; times in seconds.

    ``model_name`` and ``engine_index`` are those of vLLM's metrics. ``generation``
    is that of the sessions in use, ``is_recovering`` ends when all nodes are back.
    """

    model_name: str
    engine_index: int
    generation: int = 0
    is_recovering: bool = False
    num_recoveries: int = 0
    recovery_s: float = 0.0
    last_recovery_s: float = 0.0
    num_recomputed_tokens: int = 0
    num_pool_blocks: int = 0
