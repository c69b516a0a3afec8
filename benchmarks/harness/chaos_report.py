# SPDX-License-Identifier: Apache-2.0
"""The report of ``chaos.py``: counts, times of recovery, and its table."""

from __future__ import annotations

import argparse
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from harness.faults import IS_BACK
from rich.console import Console
from rich.table import Table


@dataclass
class Report:
    """Counts and times of a run, filled by all threads."""

    faults: dict[str, int] = field(default_factory=dict)
    requests: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    kill_to_pool_s: list[float] = field(default_factory=list)
    kill_to_token_s: list[float] = field(default_factory=list)
    recoveries: int = 0
    requests_recomputed: int = 0
    tokens_recomputed: int = 0
    tokens: int = 0
    #: Of every node process that got warm: seconds that it was seen, growth in MiB.
    node_growth: list[tuple[float, float]] = field(default_factory=list)


def _longest_gap_end(times_s: list[float], killed_s: float) -> float:
    """End of the longest gap between tokens around a kill.

    Tokens that were under way still arrive at once, so the gap may start later.
    """
    ordered = sorted(times_s)
    gaps = [
        (later - earlier, later)
        for earlier, later in zip(ordered, ordered[1:], strict=False)
        if killed_s - 1.0 < earlier < killed_s + 1.0
    ]
    return max(gaps, default=(0.0, killed_s))[1]


def time_recovery(
    killed_s: float, restored_s: list[float], token_s: list[float], report: Report
) -> None:
    """Note the time from a kill to the restored pool, and to the next token."""
    restored = next((time_s for time_s in sorted(restored_s) if time_s > killed_s), 0.0)
    if restored:
        report.kill_to_pool_s.append(restored - killed_s)
        report.kill_to_token_s.append(_longest_gap_end(token_s, killed_s) - killed_s)


def read_log(log: Path, report: Report) -> None:
    text = log.read_text("utf-8", "replace")
    report.recoveries = text.count(IS_BACK)
    for requests, tokens in re.findall(
        r"(\d+) running requests are computed again, ([\d,]+) tokens", text
    ):
        report.requests_recomputed += int(requests)
        report.tokens_recomputed += int(tokens.replace(",", ""))


def show(report: Report, arguments: argparse.Namespace) -> None:
    table = Table(title=f"{arguments.minutes:g} minutes, seed {arguments.seed}")
    table.add_column("what")
    table.add_column("value", justify="right")
    pools, tokens = report.kill_to_pool_s, report.kill_to_token_s
    again = [token - pool for token, pool in zip(tokens, pools, strict=True)]
    rows = {
        "faults": ", ".join(f"{n} {kind}" for kind, n in sorted(report.faults.items())),
        "requests, tokens": f"{report.requests:,}, {report.tokens:,}",
        "requests failed": str(len(report.failed)),
        "answers with a wrong token": str(len(report.wrong)),
        "leaks": str(len(report.leaks)),
        "recoveries": str(report.recoveries),
        "requests computed again": f"{report.requests_recomputed:,}",
        "tokens computed again": f"{report.tokens_recomputed:,}",
        "node killed to pool restored": _spread(pools),
        "pool restored to next token": _spread(again),
        "node killed to next token": _spread(tokens),
        "warm node processes, worst growth": f"{len(report.node_growth)}, "
        f"{max((mib for _, mib in report.node_growth), default=0.0):.1f} MiB",
        "load of this host": f"{psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for problem in (*report.failed[:5], *report.wrong[:5], *report.leaks):
        console.print(problem, markup=False)


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "no kill"
    median = statistics.median(seconds)
    return f"{median:.2f} s median, {max(seconds):.2f} s worst"
