# SPDX-License-Identifier: Apache-2.0
"""Queueing time of a small session beside a greedy engine on the same memory node.

The greedy engine always has its next layers in line: of requests with long contexts, of
one request with many query rows over a long context, or of 64 sessions. The small
session sends one layer after another. All are protocol clients without vLLM.
``python benchmarks/fairness.py --output results.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from harness.environment import describe
from harness.memory_node import running_node
from rich.console import Console
from rich.table import Table

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.session_pool import SLICE_S
from vllm_attn_offload.protocol.frames import FrameFlag
from vllm_attn_offload.protocol.geometry import (
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)
from vllm_attn_offload.protocol.messages import (
    AttachSession,
    OpenSession,
    ReserveCapacity,
    Shard,
)
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.step import (
    StepMetadata,
    write_step,
)

TIMEOUT_S = 300.0
BLOCK_SIZE = 16
#: Tokens that a step stores at least; larger steps take more of the node's memory.
MIN_CHUNK = 64
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
LAYER = LayerGeometry(
    "layer", 0, 0, HEADS, KV_HEADS, HEAD_SIZE, HEAD_SIZE, HEAD_SIZE**-0.5
)
GEOMETRY = SessionGeometry("bfloat16", [KVGroup(BLOCK_SIZE)], [LAYER])


class Peer:
    """A session of one layer whose requests all read the same stored context.

    Args:
        address: The memory node.
        control: Control channel of the engine.
        name: Name of the session that the node shows.
        num_reqs: Requests of every step.
        context: Tokens that each of them attends over.
        query_len: Query rows of each request.
    """

    def __init__(
        self,
        address: str,
        control: ControlClient,
        name: str,
        num_reqs: int,
        context: int,
        query_len: int = 1,
    ) -> None:
        self.num_reqs, self._context, self._query_len = num_reqs, context, query_len
        self._num_blocks = -(-context // BLOCK_SIZE)
        self._chunk = max(MIN_CHUNK, num_reqs * query_len)
        self._control = control
        self._name = name
        # More than the blocks need, because kernels may pad them.
        kv_bytes = 2 * self._num_blocks * BLOCK_SIZE * KV_HEADS * 2 * HEAD_SIZE * 2
        reserved = self._control.reserve(
            ReserveCapacity(name, Shard(), GEOMETRY, kv_bytes)
        )
        opened = self._control.open_session(
            OpenSession(
                reserved.reservation,
                0,
                self._num_blocks,
                self._chunk,
                num_reqs,
                self._num_blocks,
            )
        )
        attach = AttachSession(
            opened.session, opened.attach_token, 0, GEOMETRY.digest(), 0
        )
        self._client = NodeClient(address, attach, TIMEOUT_S)
        self._step = 0
        self._fill()
        num_rows = num_reqs * query_len
        self._out = memoryview(bytearray(num_rows * HEADS * HEAD_SIZE * 2))
        self._query = torch.randn(num_rows, HEADS * HEAD_SIZE).bfloat16()
        self._send_step(self._attending_step())

    def post(self) -> None:
        """Send a layer."""
        self._client.post_layer(
            self._step, 0, 0, FrameFlag.NONE, _bytes(self._query), has_queries=True
        )

    def collect(self) -> None:
        """Wait for the output of the first layer that was not collected."""
        self._client.receive_out(0, self._out)

    def stats(self) -> SessionCounters:
        """The node's counters of this session."""
        sessions = self._control.stats().sessions
        return next(s.counters for s in sessions if s.engine == self._name)

    def close(self) -> None:
        """End the data channel."""
        self._client.close()

    def _fill(self) -> None:
        for begin in range(0, self._context, self._chunk):
            slots = np.arange(begin, min(begin + self._chunk, self._context))
            empty = np.empty(0, np.int32)
            stored = StepMetadata.whole(
                np.zeros(1, np.int32), empty, slots, empty.reshape(0, 0)
            )
            self._send_step(stored)
            rows = torch.randn(2, slots.size, KV_HEADS * HEAD_SIZE).bfloat16()
            flags = FrameFlag.WANT_ACK
            self._client.post_layer(
                self._step, 0, 0, flags, _bytes(rows), has_queries=False
            )
            self._client.receive_out(0, memoryview(bytearray()))

    def _attending_step(self) -> StepMetadata:
        table = np.arange(self._num_blocks, dtype=np.int32)
        return StepMetadata.whole(
            self._query_len * np.arange(self.num_reqs + 1, dtype=np.int32),
            np.full(self.num_reqs, self._context, np.int32),
            np.empty(0, np.int64),
            np.tile(table, (self.num_reqs, 1)),
        )

    def _send_step(self, step: StepMetadata) -> None:
        self._step += 1
        payload = memoryview(bytearray(step.num_bytes))
        write_step(step, payload)
        self._client.post_step(self._step, 0, 0, payload)


class Greedy(threading.Thread):
    """Keeps the peer's next layer in line while another is computed."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(daemon=True)
        self._peer = peer
        self.is_over = threading.Event()
        self.num_layers = 0

    def run(self) -> None:
        # Ends in the middle of a layer that takes minutes, when its session is closed.
        with contextlib.suppress(MemoryNodeError):
            self._peer.post()
            while not self.is_over.is_set():
                self._peer.post()
                self._peer.collect()
                self.num_layers += 1
            self._peer.collect()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data


def compute_s(stats: SessionCounters) -> float:
    """Seconds in the node's kernels."""
    return stats.store_s + stats.attend_s


def sample(peer: Peer, count: int) -> dict[str, float]:
    """Run layers one by one."""
    waits, computes = [], []
    before = peer.stats()
    for _ in range(count):
        peer.post()
        peer.collect()
        after = peer.stats()
        waits.append(after.queue_s - before.queue_s)
        computes.append(compute_s(after) - compute_s(before))
        before = after
    return summary(waits, computes)


def measure(address: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The small session alone, then beside each kind of neighbour.

    A neighbour is (sessions, requests, context, query rows of each request).
    """
    context, rows = args.context, args.rows
    neighbours = {
        f"{args.requests} x {context:,} tokens": (1, args.requests, context, 1),
        f"{rows} rows over {context:,} tokens": (1, 1, context, rows),
        f"{args.sessions} sessions": (args.sessions, 1, 1024, 1),
    }
    with closing(ControlClient(address, TIMEOUT_S)) as control:
        small = Peer(address, control, "small", 1, 128)
        results = {"alone": sample(small, args.layers)}
        for title, neighbour in neighbours.items():
            results[title] = beside(address, small, args.layers, neighbour)
        small.close()
    return results


def beside(
    address: str, small: Peer, layers: int, neighbour: tuple[int, int, int, int]
) -> dict[str, float]:
    """The small session beside one greedy engine."""
    num_sessions, num_reqs, context, rows = neighbour
    with closing(ControlClient(address, TIMEOUT_S)) as control:
        greedy = [
            Greedy(Peer(address, control, f"greedy-{i}", num_reqs, context, rows))
            for i in range(num_sessions)
        ]
        for thread in greedy:
            thread.start()
        result = sample(small, layers)
        for thread in greedy:
            thread.is_over.set()
    for thread in greedy:
        thread.join()
    return result


def summary(waits: list[float], computes: list[float]) -> dict[str, float]:
    """Median and 99th percentile of queue wait and compute time, in milliseconds."""
    return {
        f"{name}_p{q}": 1e3 * float(np.percentile(values, q))
        for name, values in (("queue_ms", waits), ("layer_ms", computes))
        for q in (50, 99)
    }


def show(results: dict[str, dict[str, float]]) -> None:
    """Print the table and the bound."""
    table = Table("neighbour", "queue p50", "queue p99", "p99 / slice", "LAYER p50")
    for title, row in results.items():
        wait_ms = row["queue_ms_p99"]
        table.add_row(
            title,
            f"{row['queue_ms_p50']:.3f} ms",
            f"{wait_ms:.3f} ms",
            f"{wait_ms / (1e3 * SLICE_S):.2f}",
            f"{row['layer_ms_p50']:.3f} ms",
        )
    console = Console()
    console.print(table)
    console.print(
        f"A slice is {1e3 * SLICE_S:g} ms; the small session should wait for one of "
        f"its neighbour (bar: 1). Load average: {os.getloadavg()[0]:.2f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--kv-cache-gib", type=float, default=4.0)
    parser.add_argument("--cpus", default=str(max(os.sched_getaffinity(0))))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    options = ("--kv-cache-gib", str(args.kv_cache_gib), "--cpus", args.cpus)
    with (
        tempfile.TemporaryDirectory() as directory,
        running_node(Path(directory), *options) as node,
    ):
        results = measure(node.address, args)
    show(results)
    if args.output:
        report = {
            "environment": describe(),
            "arguments": vars(args),
            "slice_ms": 1e3 * SLICE_S,
            **results,
        }
        args.output.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
