# SPDX-License-Identifier: Apache-2.0
"""Serves many streams while memory nodes are killed, stopped, cut off and bothered.

Meanwhile the engine runs out of descriptors, and the nodes' token is rotated.

``chaos.py --minutes 10 --seed 1`` ends with 0 where no request failed, no token was
wrong and nothing leaked, and with 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from harness import environment, faults, prompts, smollm2
from harness.chaos_clients import Clients
from harness.chaos_report import Report, read_log, show, time_recovery
from harness.chaos_watch import Watch
from harness.serve_process import ServeProcess

NUM_NODES = 2
KV_GIB = 0.5
#: Of 128 tokens; leaves room on the nodes for a second session.
POOL_BLOCKS = 96
PAUSE_S = (10.0, 20.0)
STOP_S = (5.0, 20.0)
#: For connections that were dropped last to end on both sides.
IDLE_S = 3.0
#: More descriptors or threads than this are a leak; a frontend's kept connections are
#: not counted.
SLACK = 3
#: Of a warm node process: sessions of neighbours and heaps of their threads.
MAX_GROWTH_MIB = 16.0
SHORTAGE_S = 1.0
KINDS = ("kill", "stop", "drop", "garbage", "neighbour", "descriptors", "rotate")


class Chaos:
    """Injects one fault after another.

    Args:
        server: The victim.
        choose: Seeded.
        token_file: What nodes and engine read for every connection.
        report: Filled.
    """

    def __init__(
        self,
        server: ServeProcess,
        choose: random.Random,
        token_file: Path,
        report: Report,
    ) -> None:
        self._server, self._choose, self._report = server, choose, report
        self._token_file = token_file
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

    def _descriptors(self, node: psutil.Process) -> None:
        """A node is lost while the engine can open nothing."""
        faults.kill(node)
        faults.exhaust_descriptors(self._server.process.pid, SHORTAGE_S)

    def _rotate(self, node: psutil.Process) -> None:
        """Another token; the connections that are dropped come back with it."""
        faults.rotate_token(self._token_file)
        faults.drop_connections(node)

    def _neighbour(self, node: psutil.Process) -> None:
        if not faults.visit(node, self._choose, str(self._token_file)):
            self._count("neighbour without room")


def main() -> int:
    """Run, print, and say whether all promises were kept."""
    arguments = _parse()
    report = Report()
    model = str(smollm2.prepare())
    log = Path(tempfile.mkdtemp(prefix="chaos-")) / "serve.log"
    token_file = log.with_name("token")
    faults.rotate_token(token_file)
    print(f"starting vllm serve; its log is {log}", flush=True)
    # With its pages touched, a pool's memory does not rise while it fills.
    server = ServeProcess(
        model, log, *_options(arguments, token_file), ATTN_OFFLOAD_POISON_KV="1"
    )
    try:
        clients = Clients(server, prompts.draw(model), arguments.tokens, report)
        chaos = Chaos(server, random.Random(arguments.seed), token_file, report)
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
        time_recovery(killed_s, watch.restored_s, clients.token_times_s, report)
    read_log(log, report)
    show(report, arguments)
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


def _options(arguments: argparse.Namespace, token_file: Path) -> list[str]:
    config: dict[str, Any] = {
        "num_local_nodes": NUM_NODES,
        "kv_cache_gib": KV_GIB,
        "request_timeout_s": arguments.request_timeout_s,
        "auth_token_file": str(token_file),
    }
    return [
        *("--attention-offload", "--attention-offload-config", json.dumps(config)),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"),
        *("--max-num-batched-tokens", "256", "--max-num-seqs", "32"),
        *("--num-gpu-blocks-override", str(POOL_BLOCKS)),
    ]


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


if __name__ == "__main__":
    sys.exit(main())
