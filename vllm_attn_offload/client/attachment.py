# SPDX-License-Identifier: Apache-2.0
"""What the executor tells a worker about its session on a memory node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attachment:
    """Names a session and holds the token that opens its data channel once."""

    address: str
    session: str
    attach_token: str
    generation: int
