# SPDX-License-Identifier: Apache-2.0
"""`paper.py simulate`: replay a trace on the deployments that `plan` compares."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

from lamina.conditions import Failures, NodeLoss
from lamina.result import SimulationResult
from lamina.scenario import simulate_homogeneous, simulate_offload

from vllm_attn_offload.planner.estimate.compare import Comparison, compare
from vllm_attn_offload.planner.estimate.deployment import DoesNotFitError
from vllm_attn_offload.planner.estimate.traces import Request, read_trace
from vllm_attn_offload.planner.plan import add_question, positive, read_question
from vllm_attn_offload.planner.report import format_table

Runs = dict[str, SimulationResult]


def _two_numbers(text: str) -> tuple[float, float]:
    first, _, second = text.partition(":")
    return positive(float)(first), positive(float)(second)


def add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand: the options of `plan`, and failures of memory nodes."""
    parser = commands.add_parser("simulate", help=__doc__, description=__doc__)
    add_question(parser)
    add = parser.add_argument_group("simulation").add_argument
    add(
        "--straggler",
        type=_two_numbers,
        default=(0.0, 1.0),
        metavar="P:FACTOR",
        help="a node is slow by FACTOR in a share P of the steps",
    )
    add(
        "--node-loss",
        type=_two_numbers,
        metavar="AT:DOWN",
        action="append",
        default=[],
        help="a memory node dies after AT seconds and is replaced after DOWN",
    )
    add("--json", action="store_true", help="print JSON instead of a table")


def run_simulate(args: argparse.Namespace) -> int:
    """Replay and print; returns the exit status.

    Raises:
        ValueError: Bad options, or a file that cannot be read.
    """
    if args.trace is None:
        raise ValueError(
            "paper.py simulate was called without --trace. The simulator replays a "
            "trace. Add --trace FILE."
        )
    failures = _failures(args)
    result, requests = compare(read_question(args)), read_trace(args.trace)
    runs, refused = simulate_comparison(result, requests, failures)
    if args.json:
        print(json.dumps({label: asdict(r) for label, r in runs.items()}, indent=2))
        return 0
    hours = requests[-1].arrival_s / 3600
    print(f"Trace of {len(requests):,} requests over {hours:.2f} hours, replayed:")
    print("\n".join([_table(runs), *refused]))
    return 0


def _failures(args: argparse.Namespace) -> Failures:
    share, factor = args.straggler
    if share > 1 or factor < 1:
        raise ValueError(
            f"--straggler {share:g}:{factor:g} is not possible. The share of steps is "
            "at most 1 and the factor at least 1. For example 0.01:3."
        )
    losses = tuple(NodeLoss(at_s, down_s) for at_s, down_s in args.node_loss)
    return Failures(share, factor, losses)


def simulate_comparison(
    result: Comparison, requests: Sequence[Request], failures: Failures
) -> tuple[Runs, list[str]]:
    """Each deployment replays the trace as it was recorded.

    Args:
        failures: They happen to memory nodes only.

    Returns:
        Results by label, and sentences on deployments that do not fit.
    """
    q = result.question
    offload, workload = q.offload, q.workload
    attempts: dict[str, Callable[[], SimulationResult]] = {}
    for e in result.offloaded:
        engine = replace(offload, compute=offload.compute.split(e.replicas))
        run = partial(simulate_offload, q.shape, engine, workload, requests)
        n = e.num_micro_batches
        attempts[f"{e.label}, n={n}"] = partial(run, n, e.replicas, failures)
    kinds = {d.device.name: d for d in (offload.memory, offload.compute)}
    for e in result.alternatives:
        # The label of homogeneous devices is COUNTxNAME.
        devices = replace(kinds[e.label.partition("x")[2]], count=e.num_devices)
        alone = partial(simulate_homogeneous, q.shape, devices.split(e.replicas))
        attempts[e.label] = partial(alone, e.replicas, workload, requests)
    runs: Runs = {}
    refused: list[str] = []
    for label, attempt in attempts.items():
        try:
            runs[label] = attempt()
        except DoesNotFitError as error:
            refused.append(f"{label}: {error}")
    return runs, refused


def _table(runs: Mapping[str, SimulationResult]) -> str:
    header = ["Simulated", "Tokens/s", "Batch", "TBT p50/p99 ms", "TTFT p50/p99 s"]
    header += ["Preempted", "KV peak", "Hours"]
    rows = [
        [label, f"{r.tokens_per_s:,.0f}", f"{r.mean_batch:,.0f}"]
        + [f"{r.tbt_p50_s * 1e3:.0f} / {r.tbt_p99_s * 1e3:.0f}"]
        + [f"{r.ttft_p50_s:.1f} / {r.ttft_p99_s:.1f}", f"{r.num_preemptions:,}"]
        + [f"{r.kv_peak_share:.0%}", f"{r.makespan_s / 3600:.2f}"]
        for label, r in runs.items()
    ]
    return format_table(header, rows)
