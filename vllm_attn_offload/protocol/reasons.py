# SPDX-License-Identifier: Apache-2.0
"""Why a node refuses peers and frames: fixed words, so that no label is a peer's."""

from __future__ import annotations

from typing import Literal, get_args

#: One per connection or request that was refused. peer: a user that may not open the
#: Unix socket; connections: too many; request: one that the protocol or the node does
#: not allow.
RefusedReason = Literal[
    "version", "token", "tls", "peer", "connections", "capacity", "request"
]
#: What of a data channel was wrong when it was closed.
InvalidFrame = Literal["header", "kind", "step", "layer"]

REFUSED_REASONS: tuple[RefusedReason, ...] = get_args(RefusedReason)
INVALID_FRAMES: tuple[InvalidFrame, ...] = get_args(InvalidFrame)
