# SPDX-License-Identifier: Apache-2.0
"""What the executor tells a worker about its session on a memory node."""

from __future__ import annotations

from dataclasses import dataclass

#: A node, and why a worker cannot use it.
Problem = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Attachment:
    """Names a session and holds the token that opens its data channel once.

    ``num_blocks`` is how many blocks the session holds. ``generation`` counts how often
    the engine opened its sessions; channels of an older one are never used again.
    """

    address: str
    session: str
    attach_token: str
    generation: int
    num_blocks: int
