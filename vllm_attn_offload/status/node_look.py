# SPDX-License-Identifier: Apache-2.0
"""What one memory node said when it was asked once, or why it did not."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attn_offload.protocol.messages import Stats


@dataclass(frozen=True, slots=True)
class NodeLook:
    """An answer, or its absence.

    Attributes:
        address: The node, as the user or the engine wrote it.
        at_s: When it answered, on this host's monotonic clock.
        stats: Its answer to GetStats; None: it gave none.
        ping_s: Round trip of the smallest request.
        state: ``serving``, ``refuses`` where it answers but not to us, ``no answer``.
        problem: What happened and what to do, where it is not serving.
    """

    address: str
    at_s: float
    stats: Stats | None = None
    ping_s: float = 0.0
    state: str = "serving"
    problem: str = ""

    @property
    def name(self) -> str:
        """The node's own name where it is known, else the address."""
        return (self.stats.node.name if self.stats else "") or self.address

    @property
    def kernel(self) -> str:
        """Name of the attention kernel, without that of its instructions."""
        assert self.stats is not None
        info = self.stats.node
        return info.attention_kernel.removesuffix(f" ({info.isa})")
