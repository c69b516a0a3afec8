# SPDX-License-Identifier: Apache-2.0
"""The planner's step time against the engine's, on this machine, point by point.

Memory nodes are started here, ``vllm-attn-offload calibrate`` measures them and this
machine, and its file predicts decode steps that calibration did not time. Run it on a
quiet machine: calibration and measurement see the same load only there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from engines.launch import EngineProcess
from engines.mode import EngineMode
from harness import environment
from harness.progress import track
from harness.smollm2 import prepare
from rich.console import Console
from rich.table import Table

from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess
from vllm_attn_offload.planner.estimate.deployment import Estimate, evaluate_offload
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.catalogue import load_catalogue
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.model.config import read_model_shape

NAME = "here"
MEDIAN_BAR, WORST_BAR = 0.10, 0.25
MARGIN_TOKENS = 512
# offline_engine.py warms up for this many steps, so contexts have grown by them.
WARM_UP_STEPS = 3
CALIBRATE_TIMEOUT_S = 900.0
TABLE_COLUMNS = 120


class Point(NamedTuple):
    """A decode step that is predicted and measured."""

    num_micro_batches: int
    batch: int
    context: int


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="default: SmolLM2-135M-Instruct")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--batch", type=int, nargs="+", default=[1, 3, 6, 12])
    add("--context", type=int, nargs="+", default=[160, 480, 1120])
    add("--microbatches", type=int, nargs="+", default=[1], choices=(1, 2))
    add("--nodes", type=int, default=1, help="memory nodes; default: %(default)s")
    add("--runs", type=int, default=3, help="default: %(default)s")
    add("--steps", type=int, default=16, help="per run; default: %(default)s")
    add("--compute-cpus", default="0", metavar="LIST")
    add("--node-cpus", default="1", metavar="LIST", help="all nodes share them")
    add("--hardware", type=Path, help="a file of calibrate, instead of a new one")
    add("--quick", action="store_true", help="calibrate quickly")
    add("--output", type=Path, help="write JSON here")
    return parser.parse_args()


def main() -> None:
    """Calibrate, predict, measure, compare."""
    arguments = parse_arguments()
    console = Console()
    console.width = max(console.width, TABLE_COLUMNS)
    model = arguments.model or str(prepare())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pr-")))
        addresses = [
            start_node(stack, folder, i, arguments) for i in range(arguments.nodes)
        ]
        hardware = arguments.hardware or calibrate(model, addresses, arguments, folder)
        rows = compare(model, addresses, hardware, arguments, folder)
        toml = hardware.read_text("utf-8")
    facts = environment.describe()
    errors = sorted(abs(row["error"]) for row in rows)
    summary = {"median_error": statistics.median(errors), "worst_error": errors[-1]}
    print_table(console, rows, summary, facts)
    if arguments.output:
        report = {"environment": facts, **summary, "rows": rows, "hardware": toml}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def start_node(
    stack: ExitStack, folder: Path, index: int, arguments: argparse.Namespace
) -> str:
    """Start a memory node that lives until the end; returns its address."""
    node = MemoryNodeProcess(
        folder / f"node{index}",
        kv_cache_gib=pool_gib(arguments),
        cpus=arguments.node_cpus,
        startup_timeout_s=60,
    )
    stack.callback(node.stop)
    return node.address


def pool_gib(arguments: argparse.Namespace) -> float:
    """KV bytes of the largest batch on one node, twice, for calibration also."""
    shape = read_model_shape(arguments.model or str(prepare()), dtype=arguments.dtype)
    tokens = max(arguments.batch) * (max(arguments.context) + MARGIN_TOKENS)
    return max(2 * tokens * shape.kv_bytes_per_token / (1 << 30), 4.0)


def calibrate(
    model: str, addresses: list[str], arguments: argparse.Namespace, folder: Path
) -> Path:
    """Run the command; returns its file."""
    path = folder / "hardware.toml"
    command = [
        *(sys.executable, "-c"),
        "import sys; from vllm_attn_offload.cli import main; sys.exit(main())",
        *("calibrate", "--name", NAME, "--output", str(path), "--model", model),
        *("--dtype", arguments.dtype, "--cpus", arguments.compute_cpus),
        *(part for a in addresses for part in ("--memory-node", a)),
        *(["--quick"] if arguments.quick else []),
    ]
    done = subprocess.run(command, timeout=CALIBRATE_TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit("calibrate failed; its message is above.")
    return path


def compare(
    model: str,
    addresses: list[str],
    hardware: Path,
    arguments: argparse.Namespace,
    folder: Path,
) -> list[dict[str, Any]]:
    """Rows of one engine; points and modes are repeated in turn, and medians taken."""
    points = [
        Point(n, batch, context)
        for context in arguments.context
        for batch in arguments.batch
        for n in arguments.microbatches
        if batch >= n
    ]
    measured: dict[Point, list[float]] = {point: [] for point in points}
    options = engine_options(model, addresses, arguments)
    variables = {"VLLM_CPU_OMP_THREADS_BIND": arguments.compute_cpus}
    engine = EngineProcess("offload", options, variables, folder / "engine.log")
    try:
        engine.wait_until_ready()
        # An engine's first seconds can be slower; calibration leaves them out, too.
        rounds = range(-1, arguments.runs)
        plan = [(run, point) for run in rounds for point in points]
        for run, point in track(plan, "measuring"):
            step_s = measure(engine, point, arguments.steps)
            if run >= 0:
                measured[point].append(step_s)
    finally:
        engine.stop()
    predicted = predict(model, hardware, points, arguments)
    return [row(point, predicted[point], measured[point]) for point in points]


def measure(engine: EngineProcess, point: Point, steps: int) -> float:
    """Seconds of a decode step of the running engine."""
    request = {"batch": point.batch, "context": point.context, "steps": steps}
    mode = EngineMode(engine, str(point.num_micro_batches))
    return float(mode.ask(request)["step_s"])


def engine_options(
    model: str,
    addresses: list[str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Keyword arguments of ``LLM``: offloading, as its configuration carries it."""
    offload = {"memory_nodes": addresses}
    return {
        "model": model,
        "dtype": arguments.dtype,
        "enforce_eager": True,
        "max_model_len": max(arguments.context) + MARGIN_TOKENS,
        "max_num_seqs": max(arguments.batch),
        "max_num_batched_tokens": 2048,
        "attention_offload_config": offload,
    }


def predict(
    model: str,
    hardware: Path,
    points: list[Point],
    arguments: argparse.Namespace,
) -> dict[Point, Estimate]:
    """Estimates as of ``plan``, for exactly these batches."""
    catalogue = load_catalogue([hardware])
    shape = read_model_shape(model, dtype=arguments.dtype)
    name = next(n for n in catalogue.devices if f"{n}-node" in catalogue.devices)
    offload = Offload(
        DeviceCount(catalogue.device(name), 1),
        DeviceCount(catalogue.device(f"{name}-node"), arguments.nodes),
        catalogue.networks[name],
    )
    found = {}
    for point in points:
        grown = point.context + WARM_UP_STEPS + arguments.steps / 2
        load = Workload(
            grown, point.context, arguments.steps, "none", max_batch=point.batch
        )
        estimate = evaluate_offload(shape, offload, load, None, point.num_micro_batches)
        assert estimate.batch == point.batch
        found[point] = estimate
    return found


def row(point: Point, predicted: Estimate, measured: list[float]) -> dict[str, Any]:
    """Times in ms; the error is relative to the measurement."""
    measured_ms = 1e3 * statistics.median(measured)
    predicted_ms = 1e3 * predicted.tbt_s
    parts = {
        name: 1e3 * getattr(predicted, f"{name}_s")
        for name in ("overhead", "model", "attention", "wire")
    }
    return {
        "batch": point.batch,
        "context": point.context,
        "microbatches": point.num_micro_batches,
        "predicted_ms": predicted_ms,
        "measured_ms": measured_ms,
        "error": predicted_ms / measured_ms - 1,
        "parts_ms": parts,
        "runs_ms": [1e3 * seconds for seconds in measured],
    }


def print_table(
    console: Console,
    rows: list[dict[str, Any]],
    summary: dict[str, float],
    facts: dict[str, object],
) -> None:
    """Point by point, then the median and the worst against the bars."""
    table = Table(title="Decode step: ms, predicted and measured (median)")
    parts = ("overhead", "model", "attention", "wire")
    headings = ("micro-batches", "batch", "context", *parts)
    for heading in (*headings, "predicted", "measured", "error"):
        table.add_column(heading, justify="right")
    for r in rows:
        table.add_row(
            *(str(r["microbatches"]), str(r["batch"]), str(r["context"])),
            *(f"{r['parts_ms'][part]:.1f}" for part in parts),
            *(f"{r['predicted_ms']:.1f}", f"{r['measured_ms']:.1f}"),
            f"{r['error']:+.1%}",
        )
    console.print(table)
    median, worst = summary["median_error"], summary["worst_error"]
    console.print(
        f"median error {median:.1%} (bar {MEDIAN_BAR:.0%}), worst {worst:.1%} (bar "
        f"{WORST_BAR:.0%}), {len(rows)} points: "
        + ("met" if median <= MEDIAN_BAR and worst <= WORST_BAR else "NOT met")
    )
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average']}"
    )


if __name__ == "__main__":
    main()
