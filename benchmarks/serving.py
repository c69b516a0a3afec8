# SPDX-License-Identifier: Apache-2.0
"""Stock and offloading ``vllm serve`` under the same load, by ``vllm bench serve``.

Both servers run on this host and take turns, rate by rate. Without ``--trace`` the
lengths are random; a trace (Azure CSV, Mooncake JSONL) brings lengths and arrivals, and
a rate stretches its clock. ``--remote-nodes N`` puts N memory nodes on a second host, a
network namespace. Answers of both are compared. ``--plots DIR`` draws the result.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import environment
from harness.progress import track
from harness.remote_nodes import remote_nodes
from harness.serving_load import random_load, run_bench, trace_load, warm_up_load
from harness.serving_plots import plot
from harness.serving_server import MeasuredServer
from harness.smollm2 import prepare
from rich.console import Console
from rich.table import Table

TABLE_COLUMNS = 160


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="default: SmolLM2-135M-Instruct")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    add("--max-model-len", type=int, default=2048, help="default: %(default)s")
    add("--max-num-seqs", type=int, default=32, help="default: %(default)s")
    add("--kv-cache-gib", type=float, default=1.0, help="of either engine")
    add("--stock-cpus", default="0-1", metavar="LIST")
    add("--compute-cpus", default="0", metavar="LIST")
    add("--node-cpus", default="1", metavar="LIST")
    add(
        "--default",
        action="store_true",
        help="the offloading server as it is without options, on CPUs of its choice",
    )
    add("--remote-nodes", type=int, default=0, metavar="N", help="default: a local one")
    add("--serve-option", action="append", default=[], metavar="--OPTION=VALUE")
    load = parser.add_argument_group("load")
    add = load.add_argument
    add("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0], metavar="REQ/S")
    add("--num-prompts", type=int, default=64, help="per rate; default: %(default)s")
    add("--trace", type=Path, help="Azure CSV or Mooncake JSONL")
    add("--input-len", type=int, default=256, help="mean; most, with --trace")
    add("--output-len", type=int, default=64, help="mean; most, with --trace")
    add("--trace-scale", type=float, default=1.0, help="shrinks lengths of --trace")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, help="write JSON here")
    output.add_argument("--plots", type=Path, metavar="DIR", help="write PNGs here")
    arguments = parser.parse_args()
    if arguments.default:
        arguments.compute_cpus = arguments.node_cpus = ""
    if arguments.input_len + arguments.output_len > arguments.max_model_len:
        parser.error(
            f"--input-len {arguments.input_len} and --output-len "
            f"{arguments.output_len} exceed --max-model-len {arguments.max_model_len}. "
            "Their sum may be at most that. Lower them or raise --max-model-len."
        )
    return arguments


def main() -> None:
    """Serve, load, print, write."""
    arguments = parse_arguments()
    # The servers have sessions of their own: they end with us also when we are killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console()
    console.width = max(console.width, TABLE_COLUMNS)
    model = arguments.model or str(prepare())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory("-serving")))
        nodes = start_remote_nodes(arguments, folder, stack)
        servers = []
        for name, offload in (("stock", None), ("offload", nodes)):
            log = folder / f"{name}.log"
            servers.append(start(name, model, arguments, offload, log))
            stack.callback(servers[-1].stop)
        rows = measure(servers, arguments, folder)
    facts = environment.describe()
    print_table(console, rows, facts)
    report = {"environment": facts, "rows": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if arguments.plots:
        for path in plot(rows, arguments.plots):
            console.print(f"wrote {path}")


def start_remote_nodes(
    arguments: argparse.Namespace, folder: Path, stack: ExitStack
) -> dict[str, Any]:
    """Start ``--remote-nodes``; returns the offload options that name them, if any."""
    if not arguments.remote_nodes:
        return {
            "kv_cache_gib": arguments.kv_cache_gib,
            "local_node_cpus": arguments.node_cpus,
        }
    host = stack.enter_context(remote_nodes(folder / "nodes.log"))
    each_gib = arguments.kv_cache_gib / arguments.remote_nodes
    nodes = [
        host.start(each_gib, arguments.node_cpus, is_relayed=False)
        for _ in range(arguments.remote_nodes)
    ]
    return {
        "kv_cache_gib": each_gib,
        "memory_nodes": [node["address"] for node in nodes],
        "auth_token_file": nodes[0]["auth_token_file"],
    }


def start(
    name: str,
    model: str,
    arguments: argparse.Namespace,
    offload: dict[str, Any] | None,
    log: Path,
) -> MeasuredServer:
    """Start one engine; both get the same limits and a KV cache of the same size."""
    options = [
        *("--dtype", arguments.dtype),
        *("--max-model-len", str(arguments.max_model_len)),
        *("--max-num-seqs", str(arguments.max_num_seqs)),
        *arguments.serve_option,
    ]
    if offload is None:
        num_bytes = int(arguments.kv_cache_gib * (1 << 30))
        options += ["--kv-cache-memory-bytes", str(num_bytes)]
        cpus = arguments.stock_cpus
    else:
        options += ["--attention-offload-config", json.dumps(offload)]
        cpus = arguments.compute_cpus
    variables = {"VLLM_CPU_OMP_THREADS_BIND": cpus} if cpus else {}
    return MeasuredServer(name, model, options, variables, log)


def measure(
    servers: list[MeasuredServer], arguments: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """One row per rate and engine; engines take turns at each rate."""
    for server in servers:
        # Lazy start-up work must not land in the first rate.
        run_bench(server, warm_up_load(arguments), folder)
    rows = []
    plan = [(i, rate) for i, rate in enumerate(arguments.rates)]
    for index, rate in track(plan, "serving"):
        load = trace_load(arguments, index, rate, folder)
        if load is None:
            load = random_load(arguments, index, rate)
        texts: list[str] = []
        for server in servers:
            with server.watch() as samples:
                result = run_bench(server, load, folder)
            texts = texts or result["generated_texts"]
            rows.append(summarise(server.engine, rate, result, samples))
            rows[-1]["identical"] = count_equal(texts, result["generated_texts"])
    return rows


def summarise(
    name: str, rate: float, result: dict[str, Any], samples: list[dict[str, float]]
) -> dict[str, Any]:
    """One row of the table and the plots; times in ms."""
    keys = (
        *("completed", "failed", "duration", "request_throughput"),
        *("output_throughput", "p50_itl_ms", "p99_itl_ms", "p50_tpot_ms"),
        *("p99_tpot_ms", "p50_ttft_ms", "p99_ttft_ms"),
    )
    row: dict[str, Any] = {"engine": name, "rate": rate}
    row |= {key: result[key] for key in keys}
    samples = _from_first_request(samples)
    busy = [sample for sample in samples if sample["running"] > 0]
    row["mean_batch"] = sum(s["running"] for s in busy) / max(len(busy), 1)
    row["kv_use_peak"] = max((s["kv_use"] for s in samples), default=0.0)
    row["samples"] = samples
    return row


def count_equal(texts: list[str], others: list[str]) -> int:
    """Count answers that are the same, letter by letter."""
    return sum(a == b for a, b in zip(texts, others, strict=True))


def _from_first_request(samples: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without the seconds in which the load generator starts."""
    active = (i for i, s in enumerate(samples) if s["running"] + s["waiting"] > 0)
    left = samples[max(next(active, 0) - 1, 0) :]
    return [s | {"at_s": s["at_s"] - left[0]["at_s"]} for s in left]


def print_table(
    console: Console, rows: list[dict[str, Any]], facts: dict[str, object]
) -> None:
    """Rate by rate, stock and offload one below the other."""
    table = Table(title="Serving: TBT is the time between tokens")
    headings = ["req/s", "engine", "tokens/s", "/ stock", "TBT p50 ms", "TBT p99 ms"]
    headings += [
        "TPOT p50 ms",
        "TPOT p99 ms",
        "TTFT p50 ms",
        "TTFT p99 ms",
        "mean batch",
        "KV peak",
        "failed",
        "as stock",
    ]
    for heading in headings:
        table.add_column(heading, justify="right")
    stock = {r["rate"]: r for r in rows if r["engine"] == "stock"}
    for r in rows:
        ratio = r["output_throughput"] / stock[r["rate"]]["output_throughput"]
        table.add_row(
            *(f"{r['rate']:g}", r["engine"], f"{r['output_throughput']:.1f}"),
            *(f"{ratio:.2f}x", f"{r['p50_itl_ms']:.1f}", f"{r['p99_itl_ms']:.1f}"),
            *(f"{r['p50_tpot_ms']:.1f}", f"{r['p99_tpot_ms']:.1f}"),
            *(f"{r['p50_ttft_ms']:.0f}", f"{r['p99_ttft_ms']:.0f}"),
            *(f"{r['mean_batch']:.1f}", f"{r['kv_use_peak']:.0%}", str(r["failed"])),
            f"{r['identical']}/{r['completed']}",
        )
    console.print(table)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average']}"
    )


if __name__ == "__main__":
    main()
