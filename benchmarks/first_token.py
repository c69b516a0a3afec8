# SPDX-License-Identifier: Apache-2.0
"""Time to first token of stock vLLM and of attention offloading, cold and cached.

Both engines compute on the same CPUs and take turns. A cold prompt is attended on the
compute node; of a cached one only the new tokens are, and the memory node attends to
the rest. Run ``python benchmarks/first_token.py --help`` for the options.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from engines.launch import LOG, EngineProcess, offload_engine, stock_engine
from harness import environment
from harness.progress import track
from harness.smollm2 import prepare
from rich.console import Console
from rich.table import Table

STOCK = "stock"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=3000, help="tokens of a cold one")
    parser.add_argument(
        "--cached", type=int, default=2500, help="tokens that are cached"
    )
    parser.add_argument("--new", type=int, default=10, help="tokens that follow them")
    parser.add_argument("--runs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--compute-cpus", default="0", metavar="LIST")
    parser.add_argument("--node-cpus", default="1", metavar="LIST")
    parser.add_argument("--output", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    # What the engines of offline.py are made from.
    arguments.batch, arguments.compile = [1], False
    arguments.context = [max(arguments.prompt, arguments.cached + arguments.new)]
    return arguments


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    console = Console()
    model = arguments.model or str(prepare())
    LOG.unlink(missing_ok=True)
    engines = [
        stock_engine(arguments, model, LOG, STOCK, arguments.compute_cpus),
        offload_engine(arguments, model, LOG, "one node"),
    ]
    try:
        for engine in engines:
            engine.wait_until_ready()
        answers = measure(engines, arguments)
    finally:
        for engine in engines:
            engine.stop()
    rows = [summarise(kind, answers) for kind in ("cold", "cached")]
    facts = environment.describe()
    print_table(console, rows, arguments, facts)
    if arguments.output:
        report = {"environment": facts, "options": vars_of(arguments), "rows": rows}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def measure(
    engines: list[EngineProcess], arguments: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Answers of every run by engine; the first run only warms up."""
    answers: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
    for run in track(range(arguments.runs + 1), "measuring"):
        request = {
            "first_token": [arguments.prompt, arguments.cached, arguments.new, run]
        }
        found = [engine.ask(request) for engine in engines]
        if len({tuple(answer["tokens"]) for answer in found}) > 1:
            raise SystemExit("Offloading gives other tokens than stock; see the log.")
        for engine, answer in zip(engines, found, strict=True):
            if run:
                answers[engine.name].append(answer)
    return answers


def summarise(kind: str, answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of one kind of prompt, and offload over stock."""
    seconds = {
        name: statistics.median(answer[f"{kind}_s"] for answer in runs)
        for name, runs in answers.items()
    }
    offload = next(time for name, time in seconds.items() if name != STOCK)
    return {
        "kind": kind,
        "seconds": seconds,
        "offload_over_stock": offload / seconds[STOCK],
        "runs_s": {
            name: [answer[f"{kind}_s"] for answer in runs]
            for name, runs in answers.items()
        },
    }


def print_table(
    console: Console,
    rows: list[dict[str, Any]],
    arguments: argparse.Namespace,
    facts: dict[str, object],
) -> None:
    """One row a kind of prompt."""
    table = Table(title=f"Time to first token, ms, median ({arguments.dtype})")
    names = list(rows[0]["seconds"])
    for heading in ("prompt", *names, "offload / stock"):
        table.add_column(heading, justify="right")
    texts = {
        "cold": f"{arguments.prompt}",
        "cached": f"{arguments.cached} cached + {arguments.new}",
    }
    for row in rows:
        cells = [f"{1e3 * row['seconds'][name]:.0f}" for name in names]
        ratio = f"{row['offload_over_stock']:.2f}x"
        table.add_row(texts[row["kind"]], *cells, ratio)
    console.print(table)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average']}"
    )


def vars_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options as JSON can hold them."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }


if __name__ == "__main__":
    main()
