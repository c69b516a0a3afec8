# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM and attention offloading side by side: decode rate and where time goes.

Both engines run on this host, with the same prompts, in turns. The decode rate is the
batch divided by the median time between tokens after prefill; every request has its
own tokens. Run ``python benchmarks/offline.py --help`` for the options.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import environment
from rich.console import Console
from rich.progress import track
from rich.table import Table
from smollm2 import prepare

ENGINE_SCRIPT = Path(__file__).with_name("offline_engine.py")
CHECK_PROMPTS, CHECK_TOKENS = 8, 12
MIN_IDENTICAL = {"float32": 1.0, "bfloat16": 0.75, "float16": 0.75}
MARGIN_TOKENS = 512


class EngineProcess:
    """An engine in a process of its own.

    Args:
        name: Shown in the table.
        options: Keyword arguments of ``vllm_attn_offload.LLM``.
        variables: Added to the environment.
        log: Where the engine's output goes.
    """

    def __init__(
        self, name: str, options: dict[str, Any], variables: dict[str, str], log: TextIO
    ) -> None:
        self.name = name
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, str(ENGINE_SCRIPT), str(write), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            pass_fds=(write,),
            env=os.environ
            | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
            | variables,
        )
        os.close(write)
        self._answers = os.fdopen(read)
        self._log = log.name

    def wait_until_ready(self) -> None:
        """Wait for the model to be loaded."""
        self._read()

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def stop(self) -> None:
        """End the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> str:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"The {self.name} engine ended. See its log: {self._log}")
        return line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32", choices=MIN_IDENTICAL)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--runs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=24, help="default: %(default)s")
    parser.add_argument(
        "--stock-cpus",
        nargs="+",
        default=["0", "0-1"],
        metavar="LIST",
        help="thread bindings of stock vLLM to try; the best one is the baseline",
    )
    parser.add_argument("--compute-cpus", default="0", metavar="LIST")
    parser.add_argument("--node-cpus", default="1", metavar="LIST")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--output", type=Path, help="write JSON here")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    console = Console()
    model = arguments.model or str(prepare())
    with Path("/tmp/attn-offload-benchmark.log").open("w") as log:
        engines = start_engines(arguments, model, log)
        try:
            for engine in engines:
                engine.wait_until_ready()
            check(engines, arguments.dtype, console)
            rows = measure(engines, arguments)
        finally:
            for engine in engines:
                engine.stop()
    facts = environment.describe()
    print_tables(console, rows, facts)
    if arguments.output:
        report = {"environment": facts, "rows": rows}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def start_engines(
    arguments: argparse.Namespace, model: str, log: TextIO
) -> list[EngineProcess]:
    """One stock engine per binding, and the offloading one last."""
    longest = max(arguments.context) + MARGIN_TOKENS
    pool_gib = pool_size_gib(model, arguments, longest)
    common = {
        "model": model,
        "dtype": arguments.dtype,
        "enforce_eager": not arguments.compile,
        "max_model_len": longest,
        "max_num_seqs": max(arguments.batch),
        "max_num_batched_tokens": 2048,
    }
    engines = [
        EngineProcess(
            f"stock, CPUs {cpus}",
            {**common, "kv_cache_memory_bytes": int(pool_gib * (1 << 30))},
            {"VLLM_CPU_OMP_THREADS_BIND": cpus},
            log,
        )
        for cpus in arguments.stock_cpus
    ]
    offload = {
        **common,
        "attention_offload": True,
        "attention_offload_config": {
            "kv_cache_gib": pool_gib,
            "local_node_cpus": arguments.node_cpus,
        },
    }
    variables = {"VLLM_CPU_OMP_THREADS_BIND": arguments.compute_cpus}
    return [*engines, EngineProcess("offload", offload, variables, log)]


def pool_size_gib(model: str, arguments: argparse.Namespace, longest: int) -> float:
    """KV bytes of the largest batch, with a fifth to spare."""
    config = json.loads(Path(model, "config.json").read_text("utf-8"))
    head_size = config["hidden_size"] // config["num_attention_heads"]
    item_bytes = 4 if arguments.dtype == "float32" else 2
    token_bytes = (
        2
        * config["num_hidden_layers"]
        * config["num_key_value_heads"]
        * head_size
        * item_bytes
    )
    return round(
        1.2 * token_bytes * longest * max(arguments.batch) / (1 << 30) + 0.1, 2
    )


def check(engines: list[EngineProcess], dtype: str, console: Console) -> None:
    """Compare greedy tokens; a wrong engine prints no numbers."""
    request = {"check": [CHECK_PROMPTS, CHECK_TOKENS]}
    answers = [engine.ask(request) for engine in engines]
    same = sum(a == b for a, b in zip(answers[0], answers[-1], strict=True))
    console.print(f"{same} of {CHECK_PROMPTS} greedy sequences equal stock's ({dtype})")
    if same < MIN_IDENTICAL[dtype] * CHECK_PROMPTS:
        raise SystemExit("Offloading gives other tokens than stock; nothing is timed.")


def measure(
    engines: list[EngineProcess], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Medians over runs; engines take turns within each run."""
    points = [(b, c) for c in arguments.context for b in arguments.batch]
    answers: dict[tuple[int, int], dict[str, list[Any]]] = {
        point: {engine.name: [] for engine in engines} for point in points
    }
    plan = [(run, point) for run in range(arguments.runs) for point in points]
    for run, point in track(plan, description="measuring"):
        for engine in engines:
            request = {
                "batch": point[0],
                "context": point[1],
                "steps": arguments.steps,
                "seed": run + 1,
            }
            answers[point][engine.name].append(engine.ask(request))
    return [summarise(point, by_engine) for point, by_engine in answers.items()]


def summarise(
    point: tuple[int, int], by_engine: dict[str, list[Any]]
) -> dict[str, Any]:
    """One row: medians, ratio, and the offloading engine's time per layer."""
    step_ms = {
        name: 1e3 * statistics.median(answer["step_s"] for answer in answers)
        for name, answers in by_engine.items()
    }
    stock = min(time for name, time in step_ms.items() if name != "offload")
    parts = by_engine["offload"][0]["layer_us"]
    return {
        "batch": point[0],
        "context": point[1],
        "step_ms": step_ms,
        "tokens_per_s": {name: 1e3 * point[0] / time for name, time in step_ms.items()},
        "offload_over_best_stock": stock / step_ms["offload"],
        "layer_us": {
            part: statistics.median(a["layer_us"][part] for a in by_engine["offload"])
            for part in parts
        },
        "runs_step_ms": {
            name: [1e3 * answer["step_s"] for answer in answers]
            for name, answers in by_engine.items()
        },
    }


def print_tables(
    console: Console, rows: list[dict[str, Any]], facts: dict[str, object]
) -> None:
    """The decode rates, then where the offloading engine's time goes."""
    names = list(rows[0]["step_ms"])
    rates = Table(title="Decode: ms per token (tokens/s), median")
    for heading in ("batch", "context", *names, "offload / best stock"):
        rates.add_column(heading, justify="right")
    parts = list(rows[0]["layer_us"])
    layers = Table(title="Offload: µs per layer, median")
    for heading in ("batch", "context", *parts):
        layers.add_column(heading, justify="right")
    for row in rows:
        cells = [
            f"{row['step_ms'][name]:.1f} ({row['tokens_per_s'][name]:.0f})"
            for name in names
        ]
        ratio = f"{row['offload_over_best_stock']:.2f}x"
        rates.add_row(str(row["batch"]), str(row["context"]), *cells, ratio)
        layers.add_row(
            str(row["batch"]),
            str(row["context"]),
            *(f"{row['layer_us'][part]:.0f}" for part in parts),
        )
    console.print(rates)
    console.print(layers)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average']}"
    )


if __name__ == "__main__":
    main()
