# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM and attention offloading side by side: decode rate and where time goes.

All engines run on this host, with the same prompts, in turns. The decode rate is the
batch divided by the median time between tokens after prefill; every request has its
own tokens. ``--ablate`` compares one micro-batch, two, and stock; ``--sweep-nodes``
memory nodes. Run ``python benchmarks/offline.py --help`` for the options.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engines import tables
from engines.greedy import MAX_LEAD, leads_where_parted
from engines.launch import LOG, EngineProcess, offload_engine, stock_engine
from engines.links import Link, remote_engine, sweep_links
from engines.mode import EngineMode
from engines.nodes import sweep_nodes
from engines.trace import trace
from harness import environment
from harness.progress import track
from harness.remote_nodes import remote_nodes
from harness.smollm2 import prepare
from rich.console import Console

Side = EngineProcess | EngineMode

TABLE_COLUMNS = 170
CHECK_PROMPTS, CHECK_TOKENS = 8, 12


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="default: SmolLM2-135M-Instruct")
    add(
        "--dtype",
        default=environment.cpu_dtype(),
        choices=MAX_LEAD,
        help="default: bfloat16 where the CPU has instructions for it, else float32",
    )
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--context", type=int, nargs="+", default=[128, 1024])
    add("--runs", type=int, default=5, help="default: %(default)s")
    add("--steps", type=int, default=24, help="default: %(default)s")
    add(
        "--stock-cpus",
        nargs="+",
        default=["0", "0-1"],
        metavar="LIST",
        help="thread bindings of stock vLLM to try; the best one is the baseline",
    )
    add("--compute-cpus", default="0", metavar="LIST")
    add("--node-cpus", default="1", metavar="LIST")
    add("--compile", action="store_true", help="use torch.compile")
    add(
        "--output",
        type=Path,
        help="write JSON here; in a directory the file names cores and instructions",
    )
    add_modes(parser)
    arguments = parser.parse_args()
    if arguments.ablate:
        arguments.micro_batches = ["1", "2"]
    if arguments.default:
        arguments.compute_cpus = arguments.node_cpus = ""
        arguments.micro_batches = []
    return arguments


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what is compared."""
    add = parser.add_argument
    add(
        "--micro-batches",
        nargs="+",
        default=["auto"],
        choices=("1", "2", "auto"),
        help="measure the offloading engine with each; default: auto",
    )
    add(
        "--default",
        action="store_true",
        help="the offloading engine as it is without options, on CPUs of its choice",
    )
    add(
        "--ablate",
        action="store_true",
        help="the same as --micro-batches 1 2, with what bounds the gain",
    )
    add(
        "--trace-out",
        type=Path,
        help="write a Chrome trace of one step at the largest point, and a PNG beside",
    )
    add(
        "--sweep-nodes",
        type=lambda text: [int(count) for count in text.split(",")],
        metavar="1,2,4",
        help="compare capacity and traffic of several local nodes, and nothing else",
    )
    add(
        "--links",
        type=lambda text: [Link.parse(link) for link in text.split(",")],
        metavar="MS[@MBIT],...",
        help="compare one micro-batch, two and stock, memory nodes on a second host "
        "(a network namespace) with a longer or thinner link, and nothing else",
    )


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    console = Console()
    console.width = max(console.width, TABLE_COLUMNS)
    model = arguments.model or str(prepare())
    report: dict[str, Any] = {}
    LOG.unlink(missing_ok=True)
    if arguments.sweep_nodes:
        report["nodes"] = sweep_nodes(arguments, model, LOG)
        tables.print_nodes(console, report["nodes"])
    elif arguments.links:
        report["links"] = compare_links(arguments, model, LOG, console)
        tables.print_links(console, report["links"])
    else:
        report["rows"] = compare(arguments, model, LOG, console)
    if arguments.trace_out:
        trace(arguments, model, LOG)
        console.print(f"wrote {arguments.trace_out} and a PNG beside it")
    report["environment"] = facts = environment.describe()
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average']}"
    )
    if arguments.output:
        name = "offline-default" if arguments.default else "offline"
        output = environment.result_path(arguments.output, name)
        output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        console.print(f"wrote {output}")


def compare(
    arguments: argparse.Namespace, model: str, log: Path, console: Console
) -> list[dict[str, Any]]:
    """Stock and offloading engines in turns; prints the tables."""
    engines = [
        *(
            stock_engine(arguments, model, log, f"stock, CPUs {cpus}", cpus)
            for cpus in arguments.stock_cpus
        ),
        offload_engine(arguments, model, log, "engine"),
    ]
    modes = [EngineMode(engines[-1], option) for option in arguments.micro_batches]
    # By default the engine itself decides, and knows whose CPUs its node has.
    sides: list[Side] = [*engines] if arguments.default else [*engines[:-1], *modes]
    try:
        for engine in engines:
            engine.wait_until_ready()
        check(sides, arguments.dtype, console)
        rows = measure(sides, arguments)
    finally:
        for engine in engines:
            engine.stop()
    tables.print_rates(console, rows)
    tables.print_sums(console, rows)
    if arguments.ablate:
        tables.print_ablation(console, rows)
    return rows


def compare_links(
    arguments: argparse.Namespace, model: str, log: Path, console: Console
) -> list[dict[str, Any]]:
    """The largest point over every link, remote nodes against stock."""
    cpus = arguments.stock_cpus[-1]
    with ExitStack() as stack:
        host = stack.enter_context(remote_nodes(log))
        engines = [
            stock_engine(arguments, model, log, f"stock, CPUs {cpus}", cpus),
            remote_engine(arguments, model, log, host),
        ]
        for engine in engines:
            stack.callback(engine.stop)
        for engine in engines:
            engine.wait_until_ready()
        modes = [EngineMode(engines[1], option) for option in ("1", "2")]
        check([engines[0], *modes], arguments.dtype, console)
        return sweep_links(arguments, [engines[0], *modes], host)


def check(sides: list[Side], dtype: str, console: Console) -> None:
    """Compare greedy tokens; a wrong engine prints no numbers."""
    request = {"check": [CHECK_PROMPTS, CHECK_TOKENS]}
    answers = [side.ask(request) for side in sides]
    for side, answer in zip(sides[1:], answers[1:], strict=True):
        leads = leads_where_parted(answers[0], answer)
        same = CHECK_PROMPTS - len(leads)
        console.print(
            f"{side.name}: {same} of {CHECK_PROMPTS} greedy sequences equal those "
            f"of {sides[0].name} ({dtype}); its lead where the others part: "
            f"{[round(lead, 3) for lead in leads]}"
        )
        if max(leads, default=0.0) > MAX_LEAD[dtype]:
            raise SystemExit(f"{side.name} gives other tokens; nothing is timed.")


def measure(sides: list[Side], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over runs; engines take turns within each run."""
    points = [(b, c) for c in arguments.context for b in arguments.batch]
    answers: dict[tuple[int, int], dict[str, list[Any]]] = {
        point: {side.name: [] for side in sides} for point in points
    }
    plan = [(run, point) for run in range(arguments.runs) for point in points]
    for _, point in track(plan, "measuring"):
        for side in sides:
            request = {
                "batch": point[0],
                "context": point[1],
                "steps": arguments.steps,
            }
            answers[point][side.name].append(side.ask(request))
    return [summarise(point, by_engine) for point, by_engine in answers.items()]


def summarise(
    point: tuple[int, int], by_engine: dict[str, list[Any]]
) -> dict[str, Any]:
    """One row: medians of every engine, and an offloading step's sums."""
    step_ms = {
        name: 1e3 * statistics.median(answer["step_s"] for answer in answers)
        for name, answers in by_engine.items()
    }
    stock = [time for name, time in step_ms.items() if name.startswith("stock")]
    return {
        "batch": point[0],
        "context": point[1],
        "step_ms": step_ms,
        "tokens_per_s": {name: 1e3 * point[0] / time for name, time in step_ms.items()},
        "over_best_stock": {
            name: min(stock) / time
            for name, time in step_ms.items()
            if stock and name.startswith("offload")
        },
        "layer_us": medians(by_engine, "layer_us"),
        "sums": medians(by_engine, "sums"),
        "runs_step_ms": {
            name: [1e3 * answer["step_s"] for answer in answers]
            for name, answers in by_engine.items()
        },
    }


def medians(by_engine: dict[str, list[Any]], kind: str) -> dict[str, dict[str, float]]:
    """Medians over runs of every offloading engine's parts."""
    return {
        name: {
            part: statistics.median(answer[kind][part] for answer in answers)
            for part in answers[0][kind]
        }
        for name, answers in by_engine.items()
        if answers[0][kind]
    }


if __name__ == "__main__":
    main()
