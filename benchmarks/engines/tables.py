# SPDX-License-Identifier: Apache-2.0
"""The tables of ``offline.py``."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

#: Bars of a step in two micro-batches: over the bound, and of the ideal gain.
MAX_OVER_BOUND, MIN_OF_GAIN = 1.15, 0.87


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def print_rates(console: Console, rows: list[Row]) -> None:
    """Decode rates of all engines, and of offloading ones the ratio to stock."""
    names = list(rows[0]["step_ms"])
    ratios = list(rows[0]["over_best_stock"])
    table = _table(
        "Decode: ms per token (tokens/s), median",
        *("batch", "context", *names, *(f"{name} / best stock" for name in ratios)),
    )
    for row in rows:
        cells = [
            f"{row['step_ms'][name]:.1f} ({row['tokens_per_s'][name]:.0f})"
            for name in names
        ]
        gains = [f"{row['over_best_stock'][name]:.2f}x" for name in ratios]
        table.add_row(str(row["batch"]), str(row["context"]), *cells, *gains)
    console.print(table)


def print_sums(console: Console, rows: list[Row]) -> None:
    """Print an offloading engine's time by part: per layer, and summed over a step."""
    for title, kind, digits in (
        ("Offload: µs per layer, median", "layer_us", 1),
        ("Offload: ms per step, mean", "sums", 2),
    ):
        parts = list(next(iter(rows[0][kind].values())))
        table = _table(title, "batch", "context", "engine", *parts)
        for row in rows:
            for name, values in row[kind].items():
                cells = [f"{values[part]:.{digits}f}" for part in parts]
                table.add_row(str(row["batch"]), str(row["context"]), name, *cells)
        console.print(table)


def print_ablation(console: Console, rows: list[Row]) -> None:
    """Print the gain of two micro-batches and its bound.

    C: compute of a step, everything but waiting for attention. p: compute of both
    micro-batches over C. A: the memory node's time. latency: what an exchange takes on
    top of A, over all layers, one after another.
    """
    table = _table(
        "Two micro-batches against one (ms per step)",
        *("batch", "context", "C", "p", "A", "latency", "one", "two", "gain"),
        *(f"bound: {MAX_OVER_BOUND} max(pC, A) + latency", "two within", "gain wanted"),
    )
    for row in rows:
        one, two = row["sums"]["offload 1"], row["sums"]["offload 2"]
        compute, both = one["compute busy"], two["compute busy"]
        attention = one["node busy"]
        latency = max(0.0, one["compute idle"] - attention)
        longest = max(both, attention)
        bound = MAX_OVER_BOUND * longest + latency
        steps = [row["step_ms"][f"offload {count}"] for count in (1, 2)]
        gain, wanted = (
            steps[0] / steps[1],
            MIN_OF_GAIN * (compute + attention) / longest,
        )
        table.add_row(
            str(row["batch"]),
            str(row["context"]),
            *(f"{compute:.1f}", f"{both / compute:.2f}", f"{attention:.1f}"),
            *(f"{latency:.1f}", f"{steps[0]:.1f}", f"{steps[1]:.1f}"),
            *(f"{gain:.2f}x", f"{bound:.1f}"),
            "yes" if steps[1] <= bound else "no",
            f"{wanted:.2f}x {'met' if gain >= wanted else 'missed'}",
        )
    console.print(table)


def print_nodes(console: Console, rows: list[Row]) -> None:
    """Capacity and traffic over the number of nodes."""
    table = _table(
        "Memory nodes of one size each",
        *("nodes", "capacity, tokens", "per node", "ms per step"),
        *("bytes per row and layer", "by heads", "by blocks"),
        *("busiest node / mean", "of one request"),
    )
    for row in rows:
        expected = row["expected_bytes"]
        table.add_row(
            str(row["nodes"]),
            f"{row['capacity_tokens']:,}",
            f"{row['capacity_tokens'] / row['nodes']:,.0f}",
            f"{1e3 * row['step_s']:.1f}",
            f"{row['sums']['bytes per row and layer']:,.0f}",
            f"{expected['heads']:,.0f}",
            f"{expected['blocks']:,.0f}",
            f"{row['sums']['busiest node']:.2f}",
            f"{row['busiest_of_one_request']:.2f}",
        )
    console.print(table)


def print_links(console: Console, rows: list[Row]) -> None:
    """Throughput over the length of the link, and what pipelining wins back of it."""
    stock, one, two = rows[0]["step_ms"]
    table = _table(
        "Remote memory node: ms per step (share of stock's rate), median",
        *("link", stock, "1 micro-batch", "2 micro-batches", "of the loss recovered"),
    )
    undelayed = 1 / rows[0]["step_ms"][one]
    for row in rows:
        ms = row["step_ms"]
        cells = [f"{ms[name]:.1f} ({ms[stock] / ms[name]:.2f}x)" for name in (one, two)]
        lost = undelayed - 1 / ms[one]
        recovered = f"{(1 / ms[two] - 1 / ms[one]) / lost:.0%}" if lost > 0 else "-"
        table.add_row(row["link"], f"{ms[stock]:.1f}", *cells, recovered)
    console.print(table)
