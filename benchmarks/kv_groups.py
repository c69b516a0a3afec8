# SPDX-License-Identifier: Apache-2.0
"""What a further KV group costs in a decode step, beside the same layers in one group.

Every group has a block table, so its steps are read, divided, sent and planned apart.
Both sessions get the same tokens in turns, on one node; their outputs must be equal.
The computing between layers is not counted. ``python benchmarks/kv_groups.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from harness.environment import describe
from harness.memory_node import running_node
from rich.console import Console
from rich.table import Table
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_attn_offload.attention.cpu_exchange import CpuExchange
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.attention.readback import HostReadback
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.partition import Partition
from vllm_attn_offload.client.remote_attention import RemoteAttention
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

TIMEOUT_S = 60.0
BLOCK_SIZE = 16
HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64
#: Steps of a session in a row, and those that are not counted, because it was idle.
NUM_STEPS, NUM_IDLE = 16, 4
BAR_US = 150.0


class Engine:
    """Decode steps of some requests, in a session whose layers are in some groups.

    Args:
        address: The memory node.
        num_groups: KV groups, which share the blocks.
        args: Sizes.
        is_early: Whether a group's step is sent while another's layer is attended.
    """

    def __init__(
        self, address: str, num_groups: int, args: argparse.Namespace, *, is_early: bool
    ) -> None:
        self._is_early = is_early
        self._requests = args.requests
        self._width = -(-(args.context + NUM_STEPS) // BLOCK_SIZE)
        num_blocks = num_groups * args.requests * self._width
        self._geometry = SessionGeometry(
            "float32",
            [KVGroup(BLOCK_SIZE)] * num_groups,
            [_layer(index, num_groups) for index in range(args.layers)],
        )
        storages = -(-args.layers // num_groups)
        row_bytes = KV_HEADS * 2 * HEAD_SIZE * 4
        kv_bytes = num_blocks * BLOCK_SIZE * storages * row_bytes
        self._control = ControlClient(address, TIMEOUT_S)
        name = f"{num_groups} groups, early: {is_early}"
        reserved = self._control.reserve(
            ReserveCapacity(name, Shard(), self._geometry, kv_bytes)
        )
        opened = self._control.open_session(
            OpenSession(
                reserved.reservation, 0, num_blocks, 64, args.requests, self._width
            )
        )
        digest = self._geometry.digest()
        attach = AttachSession(opened.session, opened.attach_token, 0, digest, 0)
        client = NodeClient(address, attach, TIMEOUT_S)
        partition = Partition("heads", (num_blocks,))
        self._nodes = RemoteAttention([client], partition, self._geometry)
        self._exchange = CpuExchange(self._nodes)
        self._attention = LayerAttention(HEAD_SIZE**-0.5)
        self._readbacks = [HostReadback(BLOCK_SIZE) for _ in range(num_groups)]
        tables = torch.arange(num_blocks, dtype=torch.int32)
        self._tables = tables.reshape(num_groups, args.requests, self._width)
        self._context = self._length = args.context

    def step(self, rows: torch.Tensor, between: Computing) -> tuple[float, list[float]]:
        """Decode one token of every request.

        Args:
            rows: Rows ``q | k | v`` of every layer,
                ``[num_layers, num_requests, HEADS + 2 * KV_HEADS, HEAD_SIZE]``.
            between: What the compute node does before each layer.

        Returns:
            Seconds of attention, reading the batch included; sums of the outputs.
        """
        self._length += 1
        if self._length > self._context + NUM_STEPS:
            self._length = self._context + 1
        commons = [self._common(table) for table in self._tables]
        outputs = torch.empty(len(rows), self._requests, HEADS, HEAD_SIZE)
        parts = [layer.split((HEADS, KV_HEADS, KV_HEADS), 1) for layer in rows]
        started = time.perf_counter()
        sent = [
            AttentionOffloadMetadata(
                readback.begin(common), BLOCK_SIZE, layer_name=f"layers.{group}"
            )
            for group, (readback, common) in enumerate(
                zip(self._readbacks, commons, strict=True)
            )
        ]
        if self._is_early:
            sent[0].later = sent[1]
        seconds = time.perf_counter() - started
        for index, each in enumerate(self._geometry.layers):
            between.run()
            started = time.perf_counter()
            self._exchange.attend(
                sent[each.group], index, parts[index], outputs[index], self._attention
            )
            seconds += time.perf_counter() - started
        return seconds, outputs.sum(dim=(1, 2, 3)).tolist()

    def close(self) -> None:
        """End the session."""
        self._nodes.close()
        self._control.close()

    def _common(self, table: torch.Tensor) -> CommonAttentionMetadata:
        num_reqs, position = self._requests, self._length - 1
        starts = torch.arange(num_reqs + 1, dtype=torch.int32)
        lengths = torch.full((num_reqs,), self._length, dtype=torch.int32)
        blocks = table[:, position // BLOCK_SIZE].long()
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            num_reqs=num_reqs,
            num_actual_tokens=num_reqs,
            max_query_len=1,
            max_seq_len=self._length,
            block_table_tensor=table,
            slot_mapping=blocks * BLOCK_SIZE + position % BLOCK_SIZE,
        )


class Computing:
    """Stands for the rest of a layer: a product of matrices."""

    def __init__(self) -> None:
        self._rows, self._weights = torch.randn(8, 512), torch.randn(512, 1024)

    def run(self) -> None:
        """Compute for some hundreds of microseconds."""
        torch.mm(self._rows, self._weights)


def _layer(index: int, num_groups: int) -> LayerGeometry:
    return LayerGeometry(
        f"layers.{index}",
        index % num_groups,
        index // num_groups,
        HEADS,
        KV_HEADS,
        HEAD_SIZE,
        HEAD_SIZE,
        HEAD_SIZE**-0.5,
    )


def measure(address: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds of attention in every counted step.

    Raises:
        RuntimeError: Outputs differ between the sessions.
    """
    torch.set_num_threads(1)
    between = Computing()
    with ExitStack() as stack:
        engines = {
            "one group": Engine(address, 1, args, is_early=False),
            "two groups": Engine(address, 2, args, is_early=True),
            "two groups, sent when needed": Engine(address, 2, args, is_early=False),
        }
        for engine in engines.values():
            stack.enter_context(closing(engine))
        times: dict[str, list[float]] = {name: [] for name in engines}
        shape = (args.layers, args.requests, HEADS + 2 * KV_HEADS, HEAD_SIZE)
        for _ in range(args.rounds):
            rows = [torch.randn(shape) for _ in range(NUM_STEPS)]
            sums = []
            for name, engine in engines.items():
                results = [engine.step(each, between) for each in rows]
                times[name] += [1e6 * seconds for seconds, _ in results[NUM_IDLE:]]
                sums.append([result for _, result in results])
            if any(each != sums[0] for each in sums):
                raise RuntimeError("the outputs of the sessions differ")
    return times


def show(times: dict[str, list[float]]) -> dict[str, float]:
    """Print medians; return them."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    one = medians["one group"]
    table = Table("layers in", "attention of a step", "more than in one group")
    for name, median in medians.items():
        table.add_row(name, f"{median:,.0f} us", f"{median - one:+,.0f} us")
    console = Console()
    console.print(table)
    load = os.getloadavg()[0]
    console.print(f"Bar: {BAR_US:g} us for a further group. Load average: {load:.2f}")
    return medians


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--cpus", default=str(max(os.sched_getaffinity(0))))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    options = ("--kv-cache-gib", "2", "--cpus", args.cpus)
    environment = describe()
    compute = min(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory() as directory,
        running_node(Path(directory), *options) as node,
    ):
        os.sched_setaffinity(0, {compute})
        medians = show(measure(node.address, args))
    if args.output:
        report = {
            "environment": environment,
            "arguments": vars(args),
            "attention_us_per_step": medians,
        }
        args.output.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
