# SPDX-License-Identifier: Apache-2.0
"""All that one look found, ready to be shown."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from vllm_attn_offload.printable import printable
from vllm_attn_offload.status.cells import duration_cell, name_cell
from vllm_attn_offload.status.engine_answer import EngineAnswer
from vllm_attn_offload.status.node_report import NodeReport

_CERTIFICATE_WARNING_S = 14 * 86400


@dataclass(frozen=True, slots=True)
class Report:
    """Nodes, and engines where a server was asked.

    Attributes:
        nodes: In the order of their addresses.
        engine: What the server said; None: none was asked.
        unix_time: Of the look.
        has_rates: Whether this is a look of several.
    """

    nodes: list[NodeReport]
    engine: EngineAnswer | None
    unix_time: float
    has_rates: bool

    @property
    def exit_status(self) -> int:
        """1 where a node or the server does not answer."""
        silent = any(each.stats is None for each in self.nodes)
        return 1 if silent or (self.engine and self.engine.problem) else 0

    @property
    def imbalance(self) -> float | None:
        """Attended tokens of the busiest node over the mean; None of a single one."""
        # Of rates, or of totals: a node that missed the look before has no rates.
        of_nodes = [
            each.attended_tokens(has_rates=self.has_rates) for each in self.nodes
        ]
        attended = [each for each in of_nodes if each is not None]
        if len(attended) < 2 or sum(attended) <= 0:
            return None
        return max(attended) * len(attended) / sum(attended)

    def imbalance_note(self) -> str:
        """Return the imbalance with what it is; empty where there is none."""
        if self.imbalance is None:
            return ""
        return (
            f"imbalance {self.imbalance:.2f}: attended tokens of the busiest node over "
            "the mean"
        )

    def problems(self) -> Iterator[str]:
        """Sentences about what is not as it should be."""
        for node in self.nodes:
            yield from _notes_of(node, self.unix_time)
        if self.engine is not None and self.engine.problem:
            yield printable(self.engine.problem)

    def document(self) -> dict[str, Any]:
        """Return what ``--json`` writes; NaN and infinite numbers become null."""
        document: dict[str, Any] = {
            "time": self.unix_time,
            "nodes": [_document(each) for each in self.nodes],
            "imbalance": self.imbalance,
        }
        if self.engine is not None:
            document["engines"] = [asdict(each) for each in self.engine.engines]
            document["engine_problem"] = self.engine.problem
        plain: dict[str, Any] = json.loads(msgspec.json.encode(document))
        return plain


def _document(node: NodeReport) -> dict[str, Any]:
    look = node.look
    return {
        "address": look.address,
        "name": look.name,
        "state": look.state,
        "problem": look.problem,
        "ping_s": look.ping_s if look.stats else None,
        "stats": look.stats,
        "rates": node.rates,
        "session_rates": [
            {"engine": engine, "tp_rank": rank, "generation": generation}
            | asdict(rates)
            for (engine, rank, generation), rates in node.session_rates.items()
        ],
    }


def _notes_of(node: NodeReport, unix_time: float) -> Iterator[str]:
    name = name_cell(node.look.name)
    if node.stats is None:
        yield f"{name}: {printable(node.look.problem)}"
        return
    for what, counts in (
        ("refused", node.stats.refused),
        ("invalid frames", node.stats.invalid_frames),
    ):
        shown = [f"{reason} {n:,}" for reason, n in sorted(counts.items()) if n]
        if shown:
            yield f"{name}: {what}: {', '.join(shown)}"
    expires = node.stats.certificate_expires
    left_s = expires - unix_time
    if expires and left_s <= 0:
        yield f"{name}: its certificate has expired. Give it another one."
    elif expires and left_s < _CERTIFICATE_WARNING_S:
        yield f"{name}: its certificate expires in {duration_cell(left_s)}."


def clock(unix_time: float) -> str:
    """Time of day on this host."""
    return time.strftime("%H:%M:%S", time.localtime(unix_time))
