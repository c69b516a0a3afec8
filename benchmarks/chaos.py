# SPDX-License-Identifier: Apache-2.0
"""Serves many streams while memory nodes are killed, stopped, cut off and bothered.

``chaos.py --minutes 10 --seed 1`` ends with 0 where no request failed, no token was
wrong and nothing leaked, and with 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))

import workload
from harness import environment, faults, smollm2
from harness.chaos_watch import Watch
from rich.console import Console
from rich.table import Table
from serve import ServeProcess

NUM_NODES = 2
KV_GIB = 0.5
#: Of 128 tokens; leaves room on the nodes for a second session.
POOL_BLOCKS = 96
PAUSE_S = (10.0, 20.0)
STOP_S = (5.0, 20.0)
#: For connections that were dropped last to end on both sides.
IDLE_S = 3.0
REQUEST_DEADLINE_S = 300.0
#: More descriptors or threads than this are a leak; a frontend's kept connections are
#: not counted.
SLACK = 3
#: Of a warm node process: sessions of neighbours and heaps of their threads.
MAX_GROWTH_MIB = 16.0
KINDS = ("kill", "stop", "drop", "garbage", "neighbour")


@dataclass
class Report:
    """What happened, counted by all threads."""

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


class Clients:
    """Keeps so many streams busy and compares every answer with the undisturbed one.

    Args:
        server: What is asked.
        prompts: What is asked for, in turn.
        num_tokens: Tokens of every answer.
        report: Filled.
    """

    def __init__(
        self,
        server: ServeProcess,
        prompts: list[list[int]],
        num_tokens: int,
        report: Report,
    ) -> None:
        self._server, self._prompts, self._num_tokens = server, prompts, num_tokens
        self._report = report
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.token_times_s: list[float] = []
        self._expected = self._ask(prompts)

    def start(self, num_streams: int) -> None:
        """Begin to ask."""
        self._threads = [
            threading.Thread(target=self._work, args=(index,), daemon=True)
            for index in range(num_streams)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the running requests end."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(REQUEST_DEADLINE_S)
        if any(thread.is_alive() for thread in self._threads):
            self._report.failed.append("a stream did not end")

    def _work(self, index: int) -> None:
        while not self._stopping.is_set():
            number = index % len(self._prompts)
            index += 1
            try:
                (tokens,) = self._ask([self._prompts[number]])
            except AssertionError as error:
                self._report.failed.append(str(error) or "no end")
                continue
            with self._lock:
                self._report.requests += 1
                self._report.tokens += len(tokens)
                if tokens != self._expected[number]:
                    self._report.wrong.append(f"prompt {number}: {tokens}")

    def _ask(self, prompts: list[list[int]]) -> list[list[int]]:
        return faults.Streams(
            self._server.url,
            self._server.model,
            prompts,
            self._num_tokens,
            on_token=self._note_token,
        ).finish(REQUEST_DEADLINE_S)

    def _note_token(self) -> None:
        self.token_times_s.append(time.monotonic())


class Chaos:
    """Injects one fault after another.

    Args:
        server: The victim.
        choose: Seeded.
        report: Filled.
    """

    def __init__(
        self, server: ServeProcess, choose: random.Random, report: Report
    ) -> None:
        self._server, self._choose, self._report = server, choose, report
        self.kill_times_s: list[float] = []

    def run(self, minutes: float) -> None:
        """Until the time is over; at most one fault every few seconds."""
        start = time.monotonic()
        end = start + 60 * minutes
        while (now := time.monotonic()) < end:
            time.sleep(min(self._choose.uniform(*PAUSE_S), end - now))
            kind = self._choose.choice(KINDS)
            nodes = faults.memory_nodes(self._server.process.pid)
            if not nodes:
                continue  # All are being started again.
            self._count(kind)
            print(
                f"{now - start:4.0f} s: {kind}; {self._report.requests} requests done, "
                f"{len(self._report.failed)} failed, {len(self._report.wrong)} wrong",
                flush=True,
            )
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(self, f"_{kind}")(self._choose.choice(nodes))

    def _count(self, kind: str) -> None:
        self._report.faults[kind] = self._report.faults.get(kind, 0) + 1

    def _kill(self, node: psutil.Process) -> None:
        self.kill_times_s.append(time.monotonic())
        faults.kill(node)

    def _stop(self, node: psutil.Process) -> None:
        faults.stop(node)
        time.sleep(self._choose.uniform(*STOP_S))
        faults.resume(node)

    def _drop(self, node: psutil.Process) -> None:
        faults.drop_connections(node)

    def _garbage(self, node: psutil.Process) -> None:
        faults.send_garbage(faults.address(node), self._choose)

    def _neighbour(self, node: psutil.Process) -> None:
        if not faults.visit(node, self._choose):
            self._count("neighbour without room")


def main() -> int:
    """Run, print, and say whether all promises were kept."""
    arguments = _parse()
    report = Report()
    model = str(smollm2.prepare())
    first, _ = workload.prompts(model, "float32")
    prompts = [prompt for prompt in first if len(prompt) < 300]
    log = Path(tempfile.mkdtemp(prefix="chaos-")) / "serve.log"
    print(f"starting vllm serve; its log is {log}", flush=True)
    # With its pages touched, a pool's memory does not rise while it fills.
    server = ServeProcess(model, log, *_options(arguments), ATTN_OFFLOAD_POISON_KV="1")
    try:
        clients = Clients(server, prompts, arguments.tokens, report)
        chaos = Chaos(server, random.Random(arguments.seed), report)
        watch = Watch(server)
        before = watch.holdings()
        clients.start(arguments.streams)
        chaos.run(arguments.minutes)
        clients.stop()
        time.sleep(IDLE_S)
        _check_leaks(watch, before, report)
    finally:
        server.kill_all()
    for killed_s in chaos.kill_times_s:
        _time_recovery(killed_s, watch.restored_s, clients.token_times_s, report)
    _read_log(log, report)
    _show(report, arguments)
    if arguments.output:
        result = {
            "environment": environment.describe(),
            "arguments": vars(arguments),
            "load_average": psutil.getloadavg()[0],
            **asdict(report),
        }
        Path(arguments.output).write_text(json.dumps(result, indent=1), "utf-8")
    return 1 if report.failed or report.wrong or report.leaks else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--request-timeout-s", type=float, default=4.0)
    parser.add_argument("--output", help="write the report as JSON")
    return parser.parse_args()


def _options(arguments: argparse.Namespace) -> list[str]:
    config: dict[str, Any] = {
        "num_local_nodes": NUM_NODES,
        "kv_cache_gib": KV_GIB,
        "request_timeout_s": arguments.request_timeout_s,
    }
    return [
        *("--attention-offload", "--attention-offload-config", json.dumps(config)),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"),
        *("--max-num-batched-tokens", "256", "--max-num-seqs", "32"),
        *("--num-gpu-blocks-override", str(POOL_BLOCKS)),
    ]


def _longest_gap_end(times_s: list[float], killed_s: float) -> float:
    """When tokens came again: those that were under way still came at once."""
    ordered = sorted(times_s)
    gaps = [
        (later - earlier, later)
        for earlier, later in zip(ordered, ordered[1:], strict=False)
        if killed_s - 1.0 < earlier < killed_s + 1.0
    ]
    return max(gaps, default=(0.0, killed_s))[1]


def _time_recovery(
    killed_s: float, restored_s: list[float], token_s: list[float], report: Report
) -> None:
    """From a kill to the pool's return, and to the tokens after the pause."""
    restored = next((time_s for time_s in sorted(restored_s) if time_s > killed_s), 0.0)
    if restored:
        report.kill_to_pool_s.append(restored - killed_s)
        report.kill_to_token_s.append(_longest_gap_end(token_s, killed_s) - killed_s)


def _check_leaks(
    watch: Watch, before: dict[str, tuple[int, int]], report: Report
) -> None:
    after = watch.holdings()
    watch.stop()
    if after.keys() != before.keys():
        report.leaks.append(f"processes {sorted(before)} became {sorted(after)}")
    for name in before.keys() & after.keys():
        if any(
            new > old + SLACK
            for old, new in zip(before[name], after[name], strict=True)
        ):
            report.leaks.append(
                f"{name}: descriptors and threads grew from {before[name]} to "
                f"{after[name]}"
            )
    for life in watch.nodes.values():
        if life.warm_mib is not None:
            report.node_growth.append((life.last_s - life.seen_s, life.growth_mib))
        if life.growth_mib > MAX_GROWTH_MIB:
            report.leaks.append(f"a node grew by {life.growth_mib:.1f} MiB: {life}")
    report.leaks += watch.server.end(signal.SIGINT)


def _read_log(log: Path, report: Report) -> None:
    text = log.read_text("utf-8", "replace")
    report.recoveries = text.count("the memory nodes are back")
    for requests, tokens in re.findall(
        r"(\d+) running requests are computed again, ([\d,]+) tokens", text
    ):
        report.requests_recomputed += int(requests)
        report.tokens_recomputed += int(tokens.replace(",", ""))


def _show(report: Report, arguments: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
