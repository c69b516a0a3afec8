# SPDX-License-Identifier: Apache-2.0
"""Tokens per second with and without n-gram speculation, stock and offloading.

Prompts repeat a phrase, which the model goes on with, so n-grams of the context guess
well. All engines run on this host, with the same prompts, in turns; the offloading ones
without any option. Times are of whole requests, short prefills included. Run ``python
benchmarks/speculative.py --help`` for the options.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from engines.greedy import MAX_LEAD, leads_where_parted
from engines.launch import LOG, EngineProcess, offload_engine, stock_engine
from harness import environment
from harness.progress import track
from harness.smollm2 import prepare
from rich.console import Console
from rich.table import Table

SIDES, METHODS = ("stock", "offload"), ("plain", "ngram")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default=environment.cpu_dtype(), choices=MAX_LEAD)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], help="default: %(default)s"
    )
    parser.add_argument(
        "--context", type=int, default=96, help="tokens of a prompt; %(default)s"
    )
    parser.add_argument(
        "--tokens", type=int, default=96, help="of an answer; default: %(default)s"
    )
    parser.add_argument(
        "--drafted", type=int, default=3, help="tokens a step; default: %(default)s"
    )
    parser.add_argument("--runs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--stock-cpus", default="0-1", metavar="LIST")
    parser.add_argument("--compute-cpus", default="", metavar="LIST")
    parser.add_argument("--node-cpus", default="", metavar="LIST")
    parser.add_argument(
        "--output",
        type=Path,
        help="write JSON here; in a directory the file names cores and instructions",
    )
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    console = Console()
    model = arguments.model or str(prepare())
    LOG.unlink(missing_ok=True)
    engines = start(arguments, model)
    try:
        for engine in engines.values():
            engine.wait_until_ready()
        check(engines, arguments)
        rows = measure(engines, arguments)
    finally:
        for engine in engines.values():
            engine.stop()
    facts = environment.describe()
    print_table(console, rows, arguments)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average']}"
    )
    if arguments.output:
        report = {
            "environment": facts,
            "options": {name: str(value) for name, value in vars(arguments).items()},
            "rows": rows,
        }
        output = environment.result_path(arguments.output, "speculative")
        output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        console.print(f"wrote {output}")


def start(arguments: argparse.Namespace, model: str) -> dict[str, EngineProcess]:
    """Each side without and with speculation."""
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": arguments.drafted,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }
    engines = []
    for method in METHODS:
        sized = argparse.Namespace(**vars(arguments), compile=False)
        sized.engine = {"speculative_config": ngram} if method == "ngram" else {}
        sized.context = [arguments.context + arguments.tokens]
        name, cpus = f"stock {method}", arguments.stock_cpus
        engines.append(stock_engine(sized, model, LOG, name, cpus))
        engines.append(offload_engine(sized, model, LOG, method))
    return {engine.name: engine for engine in engines}


def check(engines: dict[str, EngineProcess], arguments: argparse.Namespace) -> None:
    """Compare answers with stock's without speculation; also warms up."""
    request = {"repetitive": [*sizes(arguments, max(arguments.batch)), True]}
    answers = {name: engine.ask(request)["answers"] for name, engine in engines.items()}
    for name, found in answers.items():
        leads = leads_where_parted(answers["stock plain"], found)
        if any(lead > MAX_LEAD[arguments.dtype] for lead in leads):
            raise SystemExit(
                f"{name} gives other tokens than stock without speculation, whose lead "
                f"there is {leads}; nothing is timed."
            )


def measure(
    engines: dict[str, EngineProcess], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row of each batch; engines take turns within each run."""
    plan = [(run, size) for run in range(arguments.runs) for size in arguments.batch]
    answers: dict[int, dict[str, list[Any]]] = {
        size: {name: [] for name in engines} for size in arguments.batch
    }
    for _, size in track(plan, "measuring"):
        request = {"repetitive": [*sizes(arguments, size), False]}
        for name, engine in engines.items():
            answers[size][name].append(engine.ask(request))
    return [summarise(size, arguments.tokens, runs) for size, runs in answers.items()]


def sizes(arguments: argparse.Namespace, batch: int) -> list[int]:
    """Prompts, tokens of each, and tokens of each answer."""
    return [batch, arguments.context, arguments.tokens]


def summarise(
    batch: int, num_tokens: int, by_engine: dict[str, list[Any]]
) -> dict[str, Any]:
    """Median rates and steps of every engine, and what they are to each other."""
    seconds = {
        name: statistics.median(run["seconds"] for run in runs)
        for name, runs in by_engine.items()
    }
    pairs = [(f"{side} ngram", f"{side} plain") for side in SIDES]
    pairs += [(f"offload {method}", f"stock {method}") for method in METHODS]
    return {
        "batch": batch,
        "tokens_per_s": {name: batch * num_tokens / s for name, s in seconds.items()},
        "num_steps": {
            name: statistics.median(run["num_steps"] for run in runs)
            for name, runs in by_engine.items()
        },
        "ratios": {f"{a} / {b}": seconds[b] / seconds[a] for a, b in pairs},
        "runs_s": {
            name: [run["seconds"] for run in runs] for name, runs in by_engine.items()
        },
    }


def print_table(
    console: Console, rows: list[dict[str, Any]], arguments: argparse.Namespace
) -> None:
    """A row of each batch, then the ratios."""
    table = Table(
        title=f"Tokens/s (steps), {arguments.tokens} new tokens each, "
        f"{arguments.drafted} drafted a step ({arguments.dtype})"
    )
    names = list(rows[0]["tokens_per_s"])
    for heading in ("prompts", *names):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [
            f"{row['tokens_per_s'][name]:.1f} ({row['num_steps'][name]:.0f})"
            for name in names
        ]
        table.add_row(f"{row['batch']} x {arguments.context}", *cells)
    console.print(table)
    for row in rows:
        for name, ratio in row["ratios"].items():
            console.print(f"{row['batch']} prompts, {name}: {ratio:.2f}x")


if __name__ == "__main__":
    main()
