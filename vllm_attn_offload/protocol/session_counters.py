# SPDX-License-Identifier: Apache-2.0
"""Where the time of a session goes on its node, and how much it exchanged."""

from __future__ import annotations

import msgspec


class SessionCounters(msgspec.Struct, forbid_unknown_fields=True):
    """Counters of a session since it was opened; times in seconds.

    ``plan_s`` is that of STEPs, ``layer_s`` of all that a LAYER takes from its header
    to the end of its answer. ``cpu_s`` is CPU time of the thread that serves; kernels
    have others beside it. The worker's own times are sums over all of its nodes, as it
    last told them.
    """

    num_steps: int = 0
    num_layer_calls: int = 0
    num_attended_tokens: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    receive_s: float = 0.0
    queue_s: float = 0.0
    store_s: float = 0.0
    attend_s: float = 0.0
    send_s: float = 0.0
    plan_s: float = 0.0
    layer_s: float = 0.0
    cpu_s: float = 0.0
    worker_pack_s: float = 0.0
    worker_send_s: float = 0.0
    worker_wait_s: float = 0.0

    def add(
        self,
        num_attended_tokens: int,
        bytes_received: int,
        bytes_sent: int,
        receive_s: float,
        send_s: float,
    ) -> None:
        """Count a layer."""
        self.num_layer_calls += 1
        self.num_attended_tokens += num_attended_tokens
        self.bytes_received += bytes_received
        self.bytes_sent += bytes_sent
        self.receive_s += receive_s
        self.send_s += send_s
