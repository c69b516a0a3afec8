# SPDX-License-Identifier: Apache-2.0
"""What a node tells about one session."""

from __future__ import annotations

import msgspec

from vllm_attn_offload.protocol.geometry import Index
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.value_types import Text, TransportName


class SessionStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Memory of one session, and its counters.

    ``engine`` is the name that the engine chose, with ``#2`` or more behind it where
    another connection has the name. ``worker_cpu_ids`` is empty before a worker
    attaches, where it is on another host, and where they are too many to tell.
    ``model`` and ``engine_index``, the data-parallel one, are the engine's.
    """

    engine: str
    tp_rank: int
    num_blocks: int
    kv_bytes: int
    worker_kv_bytes: int
    worker_state_bytes: int
    worker_cpu_ids: list[int]
    counters: SessionCounters
    model: Text
    engine_index: Index
    transport: TransportName
    generation: Index
