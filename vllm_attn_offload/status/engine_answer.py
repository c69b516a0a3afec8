# SPDX-License-Identifier: Apache-2.0
"""What a server with attention offloading says in its ``/metrics``."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_attn_offload.status.engine_row import EngineRow


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """Memory nodes and engines of a server; or, in ``problem``, why there are none."""

    addresses: list[str] = field(default_factory=list)
    engines: list[EngineRow] = field(default_factory=list)
    problem: str = ""
