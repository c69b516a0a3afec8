# SPDX-License-Identifier: Apache-2.0
"""Answer one planning question as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_attn_offload.planner.estimate.compare import compare
from vllm_attn_offload.planner.estimate.deployment import Offload, Workload
from vllm_attn_offload.planner.estimate.search import search_ratios
from vllm_attn_offload.planner.model.shape import ModelShape
from vllm_attn_offload.planner.plot import plot_plan
from vllm_attn_offload.planner.report import (
    comparison_json,
    format_comparison,
    format_table,
    format_usd,
)
from vllm_attn_offload.planner.simulate.failures import Failures
from vllm_attn_offload.planner.simulate.scenario import simulate_comparison
from vllm_attn_offload.planner.simulate.traces import Request

SEARCH_ROWS = 15


@dataclass(frozen=True, slots=True)
class Question:
    """What `plan` was asked."""

    shape: ModelShape
    offload: Offload
    workload: Workload
    requests: list[Request]
    max_micro_batches: int = 2
    price_list: str | None = None


def answer(
    question: Question,
    search: bool = False,
    failures: Failures | None = None,
    plot: Path | None = None,
) -> tuple[str, dict[str, Any]]:
    """Compare, and optionally search, simulate (with `failures`) and plot."""
    q = question
    result = compare(q.shape, q.offload, q.workload, q.max_micro_batches, q.price_list)
    parts, document = [format_comparison(result)], comparison_json(result)
    if search or plot is not None:
        ranked = search_ratios(
            q.shape, q.offload, q.workload, q.max_micro_batches, q.price_list
        )
        if plot is not None:
            plot_plan(q.shape, q.offload, q.workload, ranked, plot)
            parts.append(f"Plot: {plot}")
        if search:
            rows = [e for _, _, e in ranked]
            parts.append(_search_table(rows))
            document["search"] = [
                {"label": e.label, "tokens_per_s": e.tokens_per_s}
                | {"usd_per_hour": e.usd_per_hour, "usd_per_mtoken": e.usd_per_mtoken}
                | {"batch": e.batch, "tbt_s": e.tbt_s, "micro_batches": e.num_batches}
                for e in rows
            ]
    if failures is not None:
        text, facts = simulate_comparison(
            q.offload, q.workload, q.requests, result, failures
        )
        parts.append(text)
        document["simulation"] = facts
    return "\n\n".join(parts), document


def _search_table(rows: list[Any]) -> str:
    header = [
        "Ratio",
        "Engines",
        "Micro-batches",
        "Batch",
        "TBT ms",
        "Tokens/s",
        "USD/h",
        "USD/Mtok",
    ]
    body = [
        [
            e.label,
            str(e.replicas),
            str(e.num_batches),
            f"{e.batch:,}",
            f"{e.tbt_s * 1e3:.1f}",
        ]
        + [f"{e.tokens_per_s:,.0f}", format_usd(e.usd_per_hour)]
        + [format_usd(e.usd_per_mtoken)]
        for e in rows[:SEARCH_ROWS]
    ]
    title = (
        f"Ratios, cheapest token first ({min(len(rows), SEARCH_ROWS)} of {len(rows)})"
    )
    return f"{title}\n{format_table(header, body)}"
