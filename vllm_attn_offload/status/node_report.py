# SPDX-License-Identifier: Apache-2.0
"""One memory node between two looks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_attn_offload.protocol.messages import Stats
from vllm_attn_offload.protocol.session_stats import SessionStats
from vllm_attn_offload.status.node_look import NodeLook
from vllm_attn_offload.status.rates import Rates, SessionKey, node_rates, session_key


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node says, and what changed since it was asked before.

    Attributes:
        look: The newest answer.
        rates: Of all its sessions; None where there was no comparable look before.
        session_rates: Of those sessions that the look before had.
    """

    look: NodeLook
    rates: Rates | None
    session_rates: dict[SessionKey, Rates]

    @classmethod
    def of(cls, before: NodeLook | None, now: NodeLook) -> NodeReport:
        """Compare two looks; ``before`` is None for the first one."""
        return cls(now, *node_rates(before, now))

    @property
    def stats(self) -> Stats | None:
        """The node's answer."""
        return self.look.stats

    @property
    def kv_bytes_held(self) -> int:
        """KV memory that engines hold."""
        if self.stats is None:
            return 0
        return self.stats.node.kv_bytes_total - self.stats.node.kv_bytes_free

    def attended_tokens(self, *, has_rates: bool) -> float | None:
        """Return those of its sessions, None where they are not known or it has none.

        Args:
            has_rates: Per second since the look before; else since sessions were
                opened.
        """
        if self.stats is None or not self.stats.sessions:
            return None
        if has_rates:
            return self.rates.attended_tokens_per_s if self.rates else None
        return self.total("num_attended_tokens")

    def total(self, counter: str) -> float:
        """Sum of a field of SessionCounters over the node's sessions."""
        sessions = self.stats.sessions if self.stats else []
        return float(sum(getattr(each.counters, counter) for each in sessions))

    def sessions(self) -> Iterator[tuple[SessionStats, Rates | None]]:
        """Sessions with their rates, where there are any."""
        for session in self.stats.sessions if self.stats else []:
            yield session, self.session_rates.get(session_key(session))
