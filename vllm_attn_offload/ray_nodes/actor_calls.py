# SPDX-License-Identifier: Apache-2.0
"""Calls of a memory node's actor, with deadlines and errors of this package.

Ray learns late that a host is gone, so nothing waits for an actor without a deadline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.ray_nodes.cluster import connect, free_by_host, import_ray
from vllm_attn_offload.ray_nodes.node_actor import NodeActor, NodeState
from vllm_attn_offload.ray_nodes.node_order import NodeOrder

#: For Ray to carry a call to its actor and back, besides what the call takes.
_CALL_S = 5.0


def create_actor(order: NodeOrder, strategy: object, **options: object) -> Any:
    """Ask Ray for an actor; returns its handle at once, placed or not.

    Args:
        order: The node that it starts.
        strategy: Always given: a replica of Ray Serve would take it into its own
            placement group.
        **options: More options of the actor.
    """
    actor = connect().remote(NodeActor)
    return actor.options(
        **order.actor_options(), **options, scheduling_strategy=strategy
    ).remote(order)


def wait_until_placed(actor: Any, order: NodeOrder, name: str, timeout_s: float) -> str:
    """Return Ray's id of the host once the actor runs.

    Raises:
        MemoryNodeError: It has ended, or has no place in time.
    """
    try:
        return str(_get(actor.host_id.remote(), name, timeout_s))
    except TimeoutError as error:
        needed = order.needed
        hosts = [
            _written({name: free.get(name, 0.0) for name in needed})
            for free in free_by_host().values()
        ]
        raise MemoryNodeError(
            name,
            f"Ray has not placed it within {timeout_s:g} s. It needs "
            f"{_written(needed)} on one host, and free are, by host: "
            f"{'; '.join(hosts) or 'nothing'}. Allowed: hosts with that; give them "
            "some with ray start --resources, or ask for other resources or fewer "
            "nodes.",
        ) from error


def start_node(actor: Any, name: str, timeout_s: float) -> NodeState:
    """Have the actor start its node, unless it runs.

    Raises:
        MemoryNodeError: The actor is gone, or its node does not start.
    """
    try:
        state: NodeState = _get(actor.start.remote(), name, timeout_s + _CALL_S)
    except TimeoutError as error:
        raise MemoryNodeError(
            name,
            f"its actor has not answered within {timeout_s + _CALL_S:g} s. Its host "
            "may be lost or busy: see 'ray status'.",
        ) from error
    if state.problem:
        raise MemoryNodeError(state.address or name, state.problem)
    return state


def node_state(actor: Any, name: str) -> NodeState:
    """Ask for the state of a node; what the actor cannot tell is its problem."""
    try:
        state: NodeState = _get(actor.state.remote(), name, _CALL_S)
    except TimeoutError:
        return NodeState("", "", problem="its actor does not answer.")
    except MemoryNodeError as error:
        return NodeState("", "", problem=error.cause)
    return state


def end_actor(actor: Any) -> None:
    """End an actor for good, and its node with it, without waiting.

    One that has ended, or whose cluster has, is left alone.
    """
    ray = import_ray()
    # Without a connection Ray would open one, and the actor has ended with the last.
    if ray.is_initialized():
        with contextlib.suppress(ValueError, RuntimeError, ray.exceptions.RayError):
            ray.kill(actor, no_restart=True)


def _written(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {resources[name]:g}" for name in sorted(resources))


def _get(reference: Any, name: str, timeout_s: float) -> Any:
    ray = import_ray()
    try:
        return ray.get(reference, timeout=timeout_s)
    except TimeoutError:
        raise
    except ray.exceptions.RayError as error:
        (said, *_) = str(error).splitlines() or [type(error).__name__]
        raise MemoryNodeError(
            name, f"Ray's actor of it has ended ({said}). See 'ray status'."
        ) from error
