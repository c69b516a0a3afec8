# SPDX-License-Identifier: Apache-2.0
"""What happened on a memory node between two looks, per second."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.session_stats import SessionStats
from vllm_attn_offload.status.node_look import NodeLook

#: Engine, rank and generation: a session that is opened again counts from 0.
SessionKey = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of one session, or of all sessions of a node.

    Attributes:
        seconds: Between the two looks.
        attended_tokens_per_s: Cached tokens that attention read, in every layer.
        bytes_in_per_s: Metadata, q, k and v that arrived.
        bytes_out_per_s: Attention output that left.
        busy: Share of the time in which kernels attended or stored; a node serves one
            layer at a time.
        queue: Share of a session's time in which its layers waited for others'; the
            mean of all sessions, likewise below.
        receive: Share in which the node waited for the rest of a layer's frame.
        worker_wait: Share in which the worker waited for attention.
    """

    seconds: float
    attended_tokens_per_s: float
    bytes_in_per_s: float
    bytes_out_per_s: float
    busy: float
    queue: float
    receive: float
    worker_wait: float


def session_key(session: SessionStats) -> SessionKey:
    """Name a session so that two looks can be compared."""
    return session.engine, session.tp_rank, session.generation


def node_rates(
    before: NodeLook | None, now: NodeLook
) -> tuple[Rates | None, dict[SessionKey, Rates]]:
    """Compare two looks at a node.

    Returns:
        Rates of the node, None where the looks cannot be compared; and those of the
        sessions that both of them saw.
    """
    if before is None or before.stats is None or now.stats is None:
        return None, {}
    seconds = now.at_s - before.at_s
    if before.stats.node.instance != now.stats.node.instance or seconds <= 0:
        return None, {}
    earlier = {session_key(each): each.counters for each in before.stats.sessions}
    pairs = {
        key: (earlier[key], session.counters)
        for session in now.stats.sessions
        if (key := session_key(session)) in earlier
    }
    by_session = {key: _rates([pair], seconds) for key, pair in pairs.items()}
    return _rates(pairs.values(), seconds), by_session


def _rates(
    pairs: Iterable[tuple[SessionCounters, SessionCounters]], seconds: float
) -> Rates:
    pairs = list(pairs)

    def per_s(*fields: str) -> float:
        return (
            sum(
                getattr(now, field) - getattr(before, field)
                for before, now in pairs
                for field in fields
            )
            / seconds
        )

    num_sessions = max(len(pairs), 1)
    return Rates(
        seconds=seconds,
        attended_tokens_per_s=per_s("num_attended_tokens"),
        bytes_in_per_s=per_s("bytes_received"),
        bytes_out_per_s=per_s("bytes_sent"),
        busy=per_s("attend_s", "store_s"),
        queue=per_s("queue_s") / num_sessions,
        receive=per_s("receive_s") / num_sessions,
        worker_wait=per_s("worker_wait_s") / num_sessions,
    )
