# SPDX-License-Identifier: Apache-2.0
"""Round trips between a worker and a memory node that computes nothing.

The worker sends N bytes from its own memory and reads 0.7 N into its own memory; both
sides check sequence numbers. Worker and node are pinned to one CPU each.
``python benchmarks/transport.py --output results.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
import tracemalloc
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness.environment import describe
from harness.processes import ManagedProcess
from harness.transport_node import (
    MAX_BYTES,
    STOP_TRACING,
    TIMEOUT_S,
    TRACE,
    USAGE,
    reply_bytes,
)
from rich.console import Console
from rich.table import Table

from vllm_attn_offload.native.waits import load_waits
from vllm_attn_offload.protocol.frames import FrameHeader, FrameKind
from vllm_attn_offload.protocol.messages import Attached, AttachSession, ChannelOffer
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.control import (
    message_decoder,
    receive_message,
    send_message,
)
from vllm_attn_offload.transport.negotiate import open_worker_channel

NODE = Path(__file__).parent / "harness" / "transport_node.py"
SIZES = [4 << 10, 64 << 10, 1 << 20, 4 << 20]
WARM_UP = 50
GROWTH_TRIPS = 4000
MANY_THREADS = 1 << 16  # of the worker, which leave no CPU to spin on


@dataclass(frozen=True, slots=True)
class Way:
    """One way to carry frames."""

    name: str
    is_tcp: bool
    shared_memory: bool
    spins: bool


WAYS = [
    Way("shared memory, spin", is_tcp=False, shared_memory=True, spins=True),
    Way("shared memory", is_tcp=False, shared_memory=True, spins=False),
    Way("Unix socket, spin", is_tcp=False, shared_memory=False, spins=True),
    Way("Unix socket", is_tcp=False, shared_memory=False, spins=False),
    Way("TCP loopback, spin", is_tcp=True, shared_memory=False, spins=True),
    Way("TCP loopback", is_tcp=True, shared_memory=False, spins=False),
]


@dataclass(slots=True)
class Result:
    """Round trips of one size, and CPU time per round trip, in microseconds."""

    way: str
    num_bytes: int
    trips_us: list[float] = field(default_factory=list)
    worker_cpu_us: list[float] = field(default_factory=list)
    node_cpu_us: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """Minimum, median and p99 of all runs; medians of the runs' CPU times."""
        percentiles = statistics.quantiles(self.trips_us, n=100, method="inclusive")
        return {
            "way": self.way,
            "num_bytes": self.num_bytes,
            "num_trips": len(self.trips_us),
            "min_us": min(self.trips_us),
            "p50_us": percentiles[49],
            "p99_us": percentiles[98],
            "worker_cpu_us": statistics.median(self.worker_cpu_us),
            "node_cpu_us": statistics.median(self.node_cpu_us),
        }


@dataclass(frozen=True, slots=True)
class Rest:
    """CPU use of waits, in per cent of one CPU; memory that frames leave, in bytes."""

    way: str
    worker_idle_percent: float
    node_idle_percent: float
    worker_bytes_per_frame: float
    node_bytes_per_frame: float


class Worker:
    """The compute side of one channel; the node is a process of its own."""

    def __init__(self, way: Way, worker_cpu: int, node_cpu: int) -> None:
        self.way = way
        ours, theirs = _tcp_pair() if way.is_tcp else socket.socketpair()
        self._node = ManagedProcess(
            f"the node of {way.name}",
            [sys.executable, NODE, str(theirs.fileno()), str(node_cpu)],
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        num_threads = 1 if way.spins else MANY_THREADS
        offer = ChannelOffer([worker_cpu], num_threads, way.shared_memory)
        send_message(ours, AttachSession("s", "t", 0, "d", 0, offer), TIMEOUT_S)
        decoder = message_decoder(Attached)
        attached = receive_message(
            ours, decoder, max_bytes=1 << 16, timeout_s=TIMEOUT_S
        )
        if (attached.spin_us > 0) != way.spins:
            raise SystemExit(
                f"{way.name}: the node chose to spin {attached.spin_us} us. Give "
                "--worker-cpu and --node-cpu two different CPUs."
            )
        self._channel = open_worker_channel(ours, attached, timeout_s=TIMEOUT_S)
        self._step = 0
        self._sent, self._received = FrameHeader(), FrameHeader()
        self._usage = bytearray(USAGE.size)

    def exchange(
        self, kind: FrameKind, request: memoryview, reply: memoryview, flags: int = 0
    ) -> None:
        """One round trip."""
        sent, received = self._sent, self._received
        sent.kind, sent.flags, sent.step = kind, flags, self._step
        sent.num_bytes = request.nbytes
        self._channel.send(sent, request)
        self._channel.receive_header(received, TIMEOUT_S)
        self._channel.receive_payload_into(reply)
        if (received.step, received.num_bytes) != (self._step, reply.nbytes):
            raise RuntimeError(f"{self.way.name}: frame {received.step} in its place")
        self._step += 1

    def node_usage(self, flags: int = 0) -> tuple[float, int]:
        """CPU seconds of the node so far, and its traced bytes."""
        reply = memoryview(self._usage)
        self.exchange(FrameKind.STEP, memoryview(b""), reply, flags)
        seconds, traced = USAGE.unpack(reply)
        return seconds, traced

    def run(self, result: Result, num_trips: int) -> None:
        """Time round trips of the result's size."""
        request = memoryview(bytearray(result.num_bytes))
        reply = memoryview(bytearray(reply_bytes(result.num_bytes)))
        for _ in range(WARM_UP):
            self.exchange(FrameKind.LAYER, request, reply)
        node_before, _ = self.node_usage()
        before, trips_ns = time.process_time(), []
        for _ in range(num_trips):
            started = time.perf_counter_ns()
            self.exchange(FrameKind.LAYER, request, reply)
            trips_ns.append(time.perf_counter_ns() - started)
        result.worker_cpu_us.append((time.process_time() - before) / num_trips * 1e6)
        node_after, _ = self.node_usage()
        result.node_cpu_us.append((node_after - node_before) / num_trips * 1e6)
        result.trips_us += [trip / 1e3 for trip in trips_ns]

    def rest(self, idle_s: float, num_trips: int) -> Rest:
        """Measure what waiting costs, and what frames leave in memory."""
        node_before, _ = self.node_usage()
        before, started = time.process_time(), time.perf_counter()
        try:
            self._channel.receive_header(self._received, idle_s)
        except TimeoutError:
            elapsed = time.perf_counter() - started
        worker_s = time.process_time() - before
        node_after, _ = self.node_usage()
        worker_bytes, node_bytes = self._growth(num_trips)
        return Rest(
            way=self.way.name,
            worker_idle_percent=100 * worker_s / elapsed,
            node_idle_percent=100 * (node_after - node_before) / elapsed,
            worker_bytes_per_frame=worker_bytes / num_trips,
            node_bytes_per_frame=node_bytes / num_trips,
        )

    def _growth(self, num_trips: int) -> tuple[int, int]:
        request, reply = memoryview(bytearray(4096)), memoryview(bytearray(2867))
        self.node_usage(TRACE)
        tracemalloc.start()
        for _ in range(num_trips):
            self.exchange(FrameKind.LAYER, request, reply)
        _, node_before = self.node_usage()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(num_trips):
            self.exchange(FrameKind.LAYER, request, reply)
        after, _ = tracemalloc.get_traced_memory()
        _, node_after = self.node_usage()
        tracemalloc.stop()
        self.node_usage(STOP_TRACING)
        return after - before, node_after - node_before

    def close(self) -> None:
        """End the channel and with it the node."""
        self._channel.close()
        self._node.finish(TIMEOUT_S)


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with Address(host="127.0.0.1").listen() as listener:
        port = listener.getsockname()[1]
        ours = Address(host="127.0.0.1", port=port).connect(timeout_s=5)
        theirs, _ = listener.accept()
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return ours, theirs


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--trips", type=int, default=500, help="per run; fewer if long")
    parser.add_argument("--repeats", type=int, default=7, help="runs, interleaved")
    parser.add_argument("--idle-s", type=float, default=2.0)
    parser.add_argument("--worker-cpu", type=int, default=0)
    parser.add_argument("--node-cpu", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser


def show(results: list[dict[str, object]], rests: list[Rest]) -> None:
    """Print both tables."""
    trips = Table("way", "KB", "min us", "p50 us", "p99 us", "worker CPU", "node CPU")
    for row in results:
        kib = int(str(row["num_bytes"])) >> 10
        numbers = [row[key] for key in list(row)[3:]]
        trips.add_row(str(row["way"]), str(kib), *(f"{x:,.1f}" for x in numbers))
    idle = Table(
        "way", "worker idle %", "node idle %", "worker B/frame", "node B/frame"
    )
    for rest in rests:
        name, *numbers = asdict(rest).values()
        idle.add_row(name, *(f"{x:.2f}" for x in numbers))
    console = Console(width=100)
    console.print(trips, idle)


def main() -> None:
    args = make_parser().parse_args()
    if load_waits() is None:
        raise SystemExit(
            "No C library was built, so nothing spins or shares memory. Install a C++ "
            "compiler and run `pip install -e .` again."
        )
    if max(args.sizes) > MAX_BYTES:
        raise SystemExit(f"--sizes up to {MAX_BYTES} are allowed. Give smaller ones.")
    about = describe()
    print(f"load average: {about['load_average']}")
    os.sched_setaffinity(0, {args.worker_cpu})
    workers = [Worker(way, args.worker_cpu, args.node_cpu) for way in WAYS]
    results = {
        (worker.way.name, size): Result(worker.way.name, size)
        for size in args.sizes
        for worker in workers
    }
    for _ in range(args.repeats):
        for size in args.sizes:
            for worker in workers:
                num_trips = max(20, min(args.trips, args.trips * (1 << 18) // size))
                worker.run(results[worker.way.name, size], num_trips)
    rests = [worker.rest(args.idle_s, GROWTH_TRIPS) for worker in workers]
    for worker in workers:
        worker.close()
    summaries = [result.summary() for result in results.values()]
    show(summaries, rests)
    about["load_average_after"] = os.getloadavg()
    print(f"load average after: {about['load_average_after']}")
    if args.output:
        document = {
            "environment": about,
            "round_trips": summaries,
            "rest": [asdict(rest) for rest in rests],
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
