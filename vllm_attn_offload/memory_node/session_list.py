# SPDX-License-Identifier: Apache-2.0
"""Sessions of all engines as one answer to GetStats tells them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_attn_offload.protocol.session_stats import SessionStats

#: CPUs of all sessions' workers in an answer: 5 bytes each, a third of the longest.
_MAX_CPU_IDS = 1 << 16


def list_sessions(
    sessions: Sequence[tuple[str, SessionStats]],
) -> list[SessionStats]:
    """Tell connections apart that use one engine name, and bound what CPUs take.

    An engine's name is its own choice. The connection that came first keeps it, the
    next has ``#2`` appended, until the first is gone: that one may be an engine's lost
    connection, so the name is not refused.

    Args:
        sessions: The engine's control connection and the session, oldest first.
    """
    most = _MAX_CPU_IDS // max(len(sessions), 1)
    owners: dict[tuple[str, int], str] = {}
    told = []
    for connection, session in sessions:
        name, number = session.engine, 1
        key = (name, session.tp_rank)
        while owners.setdefault(key, connection) != connection:
            number += 1
            key = (f"{name}#{number}", session.tp_rank)
        cpu_ids = session.worker_cpu_ids
        told.append(
            msgspec.structs.replace(
                session,
                engine=key[0],
                worker_cpu_ids=cpu_ids if len(cpu_ids) <= most else [],
            )
        )
    return told
