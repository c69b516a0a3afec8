# SPDX-License-Identifier: Apache-2.0
"""Calls of a memory node's actor, with deadlines and errors of this package.

Ray learns late that a host is gone, so nothing waits for an actor without a deadline.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.ray_nodes.cluster import connect, free_by_host, import_ray
from vllm_attn_offload.ray_nodes.node_actor import NodeActor, NodeState
from vllm_attn_offload.ray_nodes.node_order import NodeOrder, written

#: For Ray to carry a call to its actor and back, besides what the call takes.
_CALL_S = 5.0
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


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


def wait_until_placed(
    actor: Any, order: NodeOrder, name: str, timeout_s: float, bundle: str = ""
) -> str:
    """Return Ray's id of the host once the actor runs.

    Args:
        actor: Handle of it.
        order: Its node.
        name: Of the node, in errors.
        timeout_s: Deadline.
        bundle: That it is to be placed in, in errors; empty: in none.

    Raises:
        MemoryNodeError: It has ended, or has no place in time.
    """
    try:
        return str(_get(actor.host_id.remote(), name, timeout_s))
    except TimeoutError as error:
        problem = _in_bundle(order, bundle) if bundle else _on_hosts(order)
        raise MemoryNodeError(
            name, f"Ray has not placed it within {timeout_s:g} s. {problem}"
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


def _on_hosts(order: NodeOrder) -> str:
    hosts = [
        written({name: free.get(name, 0.0) for name in order.needed})
        for free in free_by_host().values()
    ]
    return (
        f"It needs {written(order.needed)} on one host, and free are, by host: "
        f"{'; '.join(hosts) or 'nothing'}. Allowed: hosts with that; give them some "
        "with ray start --resources, or ask for other resources or fewer nodes."
    )


def _in_bundle(order: NodeOrder, bundle: str) -> str:
    return (
        f"It needs {written(order.needed)} in {bundle}, which something else has, or "
        "whose host is lost. Allowed: a bundle for nodes alone, on a live host. See "
        "'ray status'; add bundles to the group, or hosts to the cluster."
    )


def _get(reference: Any, name: str, timeout_s: float) -> Any:
    ray = import_ray()
    try:
        return ray.get(reference, timeout=timeout_s)
    except TimeoutError:
        raise
    except ray.exceptions.RayError as error:
        raise MemoryNodeError(
            name,
            f"Ray's actor of it has ended ({_last_line(error)}). Allowed: hosts with "
            "this version of vllm-attn-offload[ray]. See 'ray status', and worker-"
            "*.err below /tmp/ray/session_latest/logs there.",
        ) from error


def _last_line(error: Exception) -> str:
    """The cause: what Ray knows of the actor, or a traceback, comes before it."""
    lines = [line.strip() for line in _COLORS.sub("", str(error)).splitlines()]
    return next(filter(None, reversed(lines)), type(error).__name__)
