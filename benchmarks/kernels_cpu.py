# SPDX-License-Identifier: Apache-2.0
"""CPU decode attention: this package's kernel against vLLM's on the same cache content.

Both read far more than the last-level cache holds, in interleaved runs, beside a loop
that only reads. ``python benchmarks/kernels_cpu.py --output results.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from decode_kernels.cpu_result import HEADER, Result
from decode_kernels.cpu_sides import Batch, Ours, Shape, Vllm
from harness.environment import describe
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_attn_offload.native.attention import (
    CpuKernelLibrary,
    load_cpu_library,
)

FILL_TOKENS = 8192

BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gqa-32-8-128-bf16", 32, 8, 128, BF16, BF16),
        Shape("mha-32-32-128-bf16", 32, 32, 128, BF16, BF16),
        Shape("gqa-64-8-128-bf16", 64, 8, 128, BF16, BF16),
        Shape("smollm2-9-3-64-bf16", 9, 3, 64, BF16, BF16),
        Shape("gqa-32-8-128-fp32", 32, 8, 128, FP32, FP32),
        Shape("gqa-32-8-128-fp8", 32, 8, 128, BF16, FP8),
        Shape("mha-32-32-128-fp8", 32, 32, 128, BF16, FP8),
        Shape("smollm2-9-3-64-fp8", 9, 3, 64, BF16, FP8),
    )
}
# Per shape, then the sweep over batch and context of the first one.
MAIN_CASES = {
    "gqa-32-8-128-bf16": (8, 4096),
    "mha-32-32-128-bf16": (4, 2048),
    "gqa-64-8-128-bf16": (8, 4096),
    "smollm2-9-3-64-bf16": (64, 4096),
    "gqa-32-8-128-fp32": (8, 2048),
    "gqa-32-8-128-fp8": (8, 4096),
    "mha-32-32-128-fp8": (4, 2048),
    "smollm2-9-3-64-fp8": (64, 4096),
}
SWEEP = [(1, 128), (1, 1024), (1, 16384), (4, 512), (8, 128), (8, 1024), (16, 4096)]
SWEEP += [(64, 128), (64, 1024)]


class Bench:
    """One shape: both caches filled alike, and the timing of one batch."""

    def __init__(
        self, library: CpuKernelLibrary, shape: Shape, args: argparse.Namespace
    ) -> None:
        self.library, self.shape = library, shape
        self.block_size = args.block_size
        block_bytes = self.block_size * shape.token_bytes
        self.num_blocks = (args.arena_mib << 20) // block_bytes
        self.ours = Ours(library, shape, self.num_blocks, self.block_size, args.isa)
        self.vllm = Vllm(shape, self.num_blocks, self.block_size)
        size = (FILL_TOKENS, shape.num_kv_heads, shape.head_size)
        self.key, self.value = (torch.randn(size).to(shape.dtype) for _ in range(2))
        self._fill()

    def _fill(self) -> None:
        # The same tokens repeated: slot s holds token s % FILL_TOKENS.
        num_slots = self.num_blocks * self.block_size
        pool = self.library.create_pool(1)
        for begin in range(0, num_slots, FILL_TOKENS):
            slots = torch.arange(begin, min(begin + FILL_TOKENS, num_slots))
            count = len(slots)
            for side in (self.ours, self.vllm):
                side.store(pool, self.key[:count], self.value[:count], slots)
        self.library.destroy_pool(pool)

    def reference(self, batch: Batch, row: int, side: Ours | Vllm) -> torch.Tensor:
        """Float64 ``[num_query_heads, head_size]`` of one row of layer 0."""
        sequence = row // batch.rows
        later = batch.rows - 1 - row % batch.rows
        position = torch.arange(batch.lens[sequence] - later)
        block = batch.tables[0, sequence][position // self.block_size].long()
        token = (block * self.block_size + position % self.block_size) % FILL_TOKENS
        group = self.shape.num_query_heads // self.shape.num_kv_heads
        key, value = (
            side.cached(x[token]).double().repeat_interleave(group, dim=1)
            for x in (self.key, self.value)
        )
        scores = torch.einsum("hd,nhd->hn", batch.query[row].double(), key)
        probabilities = (scores * batch.scale).softmax(-1)
        return torch.einsum("hn,nhd->hd", probabilities, value)

    def check(self, batch: Batch, side: Ours | Vllm, name: str) -> float:
        """Largest error of two rows; raises RuntimeError if it is not rounding."""
        out = side.out
        error = max(
            (out[row].double() - self.reference(batch, row, side)).abs().max().item()
            for row in {0, len(out) - 1}
        )
        limit = 1e-5 if self.shape.dtype == torch.float32 else 1e-2
        if not error <= limit:
            raise RuntimeError(
                f"{name} is off by {error:.2e} on {self.shape.name}; {limit:.0e} is "
                "allowed. No number is printed for a wrong result."
            )
        return error

    def run(
        self, case: tuple[int, int], rows: int, num_threads: int, repeats: int
    ) -> Result:
        """Check, then time interleaved runs of one batch, context and rows."""
        cpu_ids = sorted(os.sched_getaffinity(0))[:num_threads]
        pool = self.library.create_pool(num_threads, cpu_ids)
        torch.set_num_threads(num_threads)
        batch = Batch(self.shape, *case, rows, self.num_blocks, self.block_size)
        ours = self.ours.prepare(batch, pool)
        vllm = self.vllm.prepare(batch, pool)
        ours(0)
        vllm(0)
        errors = [
            self.check(batch, self.ours, "ours"),
            self.check(batch, self.vllm, "vLLM"),
        ]
        layers = len(batch.tables)
        size = self.ours.memory.nbytes
        samples: dict[str, list[float]] = {"read": [], "ours": [], "vllm": []}
        for _ in range(repeats):
            with pinned(cpu_ids[0]):
                seconds = self.library.read_seconds(
                    pool, self.ours.memory.data_ptr(), size
                )
                samples["read"].append(seconds / size * batch.kv_bytes)
                samples["ours"].append(seconds_per_layer(ours, layers))
            samples["vllm"].append(seconds_per_layer(vllm, layers))
            time.sleep(0.02)  # OpenMP's threads spin for a while
        self.ours.forget_plans()
        self.library.destroy_pool(pool)
        return Result.of(batch, num_threads, samples, errors)


@contextlib.contextmanager
def pinned(cpu_id: int) -> Iterator[None]:
    """Pin the calling thread for a while."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu_id})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def seconds_per_layer(attend: Callable[[int], None], layers: int) -> float:
    """Mean time of one call over whole rounds of the layers, at least 60 ms."""
    calls = 0
    started = time.perf_counter()
    while True:
        for layer in range(layers):
            attend(layer)
        calls += layers
        elapsed = time.perf_counter() - started
        if elapsed > 0.06:
            return elapsed / calls


def make_parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        default=[1],
        help="query rows of each request: 1 + k where k drafted tokens are verified",
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7, help="at least 5")
    parser.add_argument("--arena-mib", type=int, default=512, help="per cache")
    parser.add_argument("--block-size", type=int, default=32, help="multiple of 32")
    parser.add_argument("--isa", help="one of the library's; default: the best")
    parser.add_argument("--no-sweep", action="store_true", help="main cases only")
    parser.add_argument(
        "--case",
        nargs=2,
        type=int,
        metavar=("BATCH", "CONTEXT"),
        help="this one instead of the main cases and the sweep",
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser


def cases_of(name: str, args: argparse.Namespace) -> list[tuple[int, int]]:
    """Batch and context of every case of one shape."""
    if args.case:
        batch, context = args.case
        return [(batch, context)]
    is_swept = name in (next(iter(SHAPES)), "smollm2-9-3-64-bf16")
    return [MAIN_CASES[name], *(SWEEP if is_swept and not args.no_sweep else ())]


def arena_mib_needed(args: argparse.Namespace) -> int:
    """Size of the largest case, in whole blocks."""
    sizes = [
        batch * -(-context // args.block_size) * args.block_size * shape.token_bytes
        for shape in map(SHAPES.__getitem__, args.shapes)
        for batch, context in cases_of(shape.name, args)
    ]
    return -(-max(sizes) >> 20)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    needed = arena_mib_needed(args)
    if args.arena_mib < needed:
        parser.error(
            f"--arena-mib {args.arena_mib} does not hold the largest batch. It must be "
            f"at least {needed}. Pass --arena-mib {needed}, or fewer --shapes."
        )
    library = load_cpu_library()
    if library is None:
        raise SystemExit(
            "No built CPU kernel library. Install a C++ compiler and run "
            "`pip install -e .` again."
        )
    current_platform.import_kernels()
    torch.manual_seed(0)
    about = describe() | {"isa": args.isa or library.isa_names[0]}
    print(*(f"{key}: {value}" for key, value in about.items()), HEADER, sep="\n")
    results = []
    for name in args.shapes:
        bench = Bench(library, SHAPES[name], args)
        for num_threads in args.threads:
            for case in cases_of(name, args):
                for rows in args.rows:
                    results.append(bench.run(case, rows, num_threads, args.repeats))
                    print(results[-1].line(), flush=True)
    about["load_average_after"] = os.getloadavg()
    print(f"load average after: {about['load_average_after']}")
    if args.output:
        document = {"environment": about, "results": [asdict(x) for x in results]}
        args.output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
