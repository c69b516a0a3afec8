# SPDX-License-Identifier: Apache-2.0
"""How large the steps of an engine's workers get."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class SessionLimits:
    """Size of the largest step that a worker sends."""

    max_num_tokens: int
    max_num_reqs: int
    max_blocks_per_req: int
