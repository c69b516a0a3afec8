# SPDX-License-Identifier: Apache-2.0
"""A memory node of a pool that engines share."""

from __future__ import annotations

from vllm_attn_offload.ray_nodes.node_actor import NodeState


class SharedNode:
    """Stays when an engine leaves, or loses it: others use it, too.

    Args:
        state: The node, as its actor told.
    """

    #: The process is of another host.
    pid = None

    def __init__(self, state: NodeState) -> None:
        self.address = state.address
        self.auth_token = state.auth_token

    def kill(self) -> None:
        """Leave it."""

    def request_stop(self) -> None:
        """Leave it."""

    def stop(self) -> None:
        """Leave it."""
