# SPDX-License-Identifier: Apache-2.0
"""A memory node that Ray placed for one engine."""

from __future__ import annotations

from typing import Any

from vllm_attn_offload.ray_nodes.actor_calls import end_actor
from vllm_attn_offload.ray_nodes.node_actor import NodeState


class OwnedNode:
    """Ends with its actor, and that with the engine.

    Args:
        actor: Handle of its actor.
        state: The node, as the actor started it.
    """

    #: The process is of another host.
    pid = None

    def __init__(self, actor: Any, state: NodeState) -> None:
        self.address = state.address
        self.auth_token = state.auth_token
        self.host_id = state.host_id
        self._actor = actor

    def kill(self) -> None:
        """End the actor; its node ends by itself, or with its host."""
        self.request_stop()

    def request_stop(self) -> None:
        """End the actor, without waiting for its node."""
        end_actor(self._actor)

    def stop(self) -> None:
        """End the actor. Safe to call twice."""
        self.request_stop()
