# SPDX-License-Identifier: Apache-2.0
"""What the engine tells a worker about a session, and the worker about a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class NodeFailure(NamedTuple):
    """A node that a worker cannot use, and why."""

    node: str
    cause: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """Names a session and holds the token that opens its data channel once.

    ``num_blocks`` is how many blocks the session holds. ``generation`` counts how often
    the engine opened its sessions; channels of an older one are never used again.
    ``auth_token`` is what the node asks every connection for; empty: what the
    credentials of the options hold, on the worker's host.
    """

    address: str
    session: str
    attach_token: str
    generation: int
    num_blocks: int
    auth_token: bytes = field(default=b"", repr=False)
