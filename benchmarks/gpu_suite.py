# SPDX-License-Identifier: Apache-2.0
"""Correctness and speed on one GPU machine in under 8 minutes, as one JSON file.

Needs torch, triton, numpy and this repository, and for its last three steps vLLM with
this package installed; ``--dry-run`` walks every step without a GPU, on tiny problems
in Triton's interpreter, with one pair of engines in place of all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from decode_kernels.decode_providers import PROVIDERS, Inputs, Workload, draw_inputs
from gpu.decode import measure_decode
from gpu.equality import compare_tokens
from gpu.exchange import measure_exchange
from gpu.system import measure_transports
from harness.environment import describe

ROOT = Path(__file__).resolve().parents[1]

SHAPES = [
    *((1, 512), (1, 4096), (1, 65536), (8, 4096), (32, 512), (32, 4096)),
    *((64, 1024), (64, 8192), (256, 512), (256, 2048)),
]
WORKLOADS = [
    *(
        Workload(model, kv_dtype, (context,) * batch)
        for model in ("llama-8b", "llama-70b")
        for kv_dtype in ("bf16", "fp8")
        for batch, context in SHAPES
    ),
    # The same number of tokens twice: one long request among short ones, and even.
    Workload("llama-8b", "bf16", (65536, *(1024,) * 63)),
    Workload("llama-8b", "bf16", (2032,) * 64),
]
DRY_WORKLOADS = [
    Workload("tiny", "bf16", (40, 3)),
    Workload("tiny", "fp8", (33,)),
]


class Bench:
    """Device of the steps, and what a later step needs of an earlier one."""

    def __init__(self, is_dry: bool, logs: Path | None) -> None:
        self.is_dry, self.logs = is_dry, logs
        self.device = torch.device("cpu" if is_dry else "cuda")
        self.copy_gb_per_s: float | None = None

    def time_us(self, call: Callable[[], object]) -> list[float]:
        """Median, p20 and p80 in microseconds, in a CUDA graph with a cold L2."""
        call()
        if self.is_dry:
            start = time.perf_counter()
            call()
            return [1e6 * (time.perf_counter() - start)] * 3
        from triton.testing import do_bench

        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        times = do_bench(graph.replay, warmup=20, rep=60, quantiles=[0.5, 0.2, 0.8])
        return [1000 * milliseconds for milliseconds in times]


def import_kernels() -> None:
    """Make ``vllm_attn_offload.triton_kernels`` importable from a bare checkout.

    The repository root stays off ``sys.path``: there, ``triton_kernels`` would shadow
    the package of that name that vLLM imports.
    """
    if importlib.util.find_spec("vllm_attn_offload") is not None:
        return
    package = ROOT / "vllm_attn_offload"
    spec = importlib.util.spec_from_file_location(
        "vllm_attn_offload",
        package / "__init__.py",
        submodule_search_locations=[str(package), str(ROOT)],
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vllm_attn_offload"] = module
    spec.loader.exec_module(module)


def step_environment(bench: Bench) -> dict[str, Any]:
    result = describe()
    if not bench.is_dry:
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = properties.name
        result["sms"] = properties.multi_processor_count
        result["memory_gib"] = properties.total_memory / 2**30
    return result


def step_kernel_correctness(bench: Bench) -> dict[str, Any]:
    from decode_kernels.decode_cases import CASES
    from decode_kernels.decode_problem import build_problem, find_errors

    cases = CASES[:2] + CASES[-1:] if bench.is_dry else CASES
    errors = {}
    for case in cases:
        found = find_errors(build_problem(case, bench.device))
        if found:
            errors[case.name] = found
    print(f"{len(cases) - len(errors)} of {len(cases)} cases correct")
    if errors:
        raise RuntimeError(f"wrong results, no timing is worth anything: {errors}")
    return {"cases": [case.name for case in cases]}


def step_copy_bandwidth(bench: Bench) -> dict[str, Any]:
    """Bytes read and written per second by a device-to-device copy: the floor."""
    source = torch.empty(2**16 if bench.is_dry else 2**30, dtype=torch.uint8)
    source = source.to(bench.device)
    target = torch.empty_like(source)
    times = bench.time_us(lambda: target.copy_(source))
    bench.copy_gb_per_s = 2 * source.numel() / times[0] / 1e3
    print(f"copy bandwidth {bench.copy_gb_per_s:,.0f} GB/s")
    return {"gb_per_s": bench.copy_gb_per_s, "us": times}


def exact_rows(inputs: Inputs, rows: list[int]) -> torch.Tensor:
    """The reference for a few requests, enough to know that a provider is right."""
    from vllm_attn_offload.triton_kernels.reference import (
        naive_paged_decode_attention,
    )

    return naive_paged_decode_attention(
        inputs.query[rows],
        inputs.key_cache,
        inputs.value_cache,
        torch.arange(len(rows) + 1),
        inputs.seq_lens[rows],
        inputs.block_table[rows],
        softmax_scale=inputs.scale,
    )[0]


def measure_workload(bench: Bench, workload: Workload) -> dict[str, Any]:
    """Time every provider on the same inputs; a wrong or absent one gets no number."""
    inputs = draw_inputs(workload, bench.device)
    rows = sorted({0, len(workload.seq_lens) - 1})
    exact = exact_rows(inputs, rows)
    result: dict[str, Any] = {"name": workload.name, "kv_bytes": inputs.kv_bytes}
    assert bench.copy_gb_per_s is not None
    result["floor_us"] = inputs.kv_bytes / bench.copy_gb_per_s / 1e3
    for name, provide in PROVIDERS.items():
        try:
            call = provide(inputs)
            error = (call()[rows].float() - exact).abs().max().item()
            if not error < 0.02:
                raise ArithmeticError(f"errs by {error:.3g}")
            times = bench.time_us(call)
        except Exception as reason:  # an anchor that is absent or refuses the shape
            if name == "ours":
                raise
            result[name] = {"skipped": f"{type(reason).__name__}: {reason}"[:200]}
            continue
        fraction = result["floor_us"] / times[0]
        result[name] = {"us": times, "fraction_of_copy": fraction}
    return result


def step_kernel_bandwidth(bench: Bench) -> dict[str, Any]:
    if bench.copy_gb_per_s is None:
        step_copy_bandwidth(bench)
    print(f"{'workload':<32}{'MB':>8}" + "".join(f"{n:>16}" for n in PROVIDERS))
    rows = []
    for workload in DRY_WORKLOADS if bench.is_dry else WORKLOADS:
        row = measure_workload(bench, workload)
        cells = [
            f"{row[n]['us'][0]:9.1f}us {row[n]['fraction_of_copy']:4.0%}"
            if "us" in row[n]
            else "-"
            for n in PROVIDERS
        ]
        line = "".join(f"{cell:>16}" for cell in cells)
        print(f"{row['name']:<32}{row['kv_bytes'] / 1e6:8.1f}{line}", flush=True)
        rows.append(row)
    ratios = [_best_other(row) / row["ours"]["us"][0] for row in rows]
    ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
    median = statistics.median(ratios) if ratios else None
    return {"workloads": rows, "median_speedup_over_best_other": median}


def _best_other(row: dict[str, Any]) -> float:
    others = [row[n]["us"][0] for n in PROVIDERS if n != "ours" and "us" in row[n]]
    return min(others, default=math.inf)


def step_transport(bench: Bench) -> dict[str, Any]:
    return measure_transports(bench.device, is_dry=bench.is_dry)


def step_exchange(bench: Bench) -> dict[str, Any]:
    """One layer's way to a node and back, by part."""
    return measure_exchange(bench.device, is_dry=bench.is_dry)


def step_equality(bench: Bench) -> dict[str, Any]:
    """Tokens of both model runners, eager and in graphs, with both kinds of node."""
    return compare_tokens(bench.device, is_dry=bench.is_dry, logs=bench.logs)


def step_decode(bench: Bench) -> dict[str, Any]:
    """Tokens per second beside stock, also of long contexts; what pools hold."""
    return measure_decode(bench.device, is_dry=bench.is_dry, logs=bench.logs)


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "environment": step_environment,
    "kernel-correctness": step_kernel_correctness,
    "copy-bandwidth": step_copy_bandwidth,
    "kernel-bandwidth": step_kernel_bandwidth,
    "transport": step_transport,
    "exchange": step_exchange,
    "equality": step_equality,
    "decode": step_decode,
}


def main() -> int:
    """Run the chosen steps; a step that fails is recorded and the rest still run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny, without a GPU")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--output", type=Path, help="JSON file; default: none written")
    parser.add_argument("--logs", type=Path, help="folder that keeps engines' logs")
    arguments = parser.parse_args()
    if arguments.dry_run:
        # Before any kernel is imported: the decorator reads it.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("no CUDA GPU on this host. Use --dry-run to walk the steps.")
    import_kernels()
    torch.manual_seed(0)
    if arguments.logs is not None:
        arguments.logs.mkdir(parents=True, exist_ok=True)
        arguments.logs = arguments.logs.absolute()
    bench = Bench(arguments.dry_run, arguments.logs)
    workloads = DRY_WORKLOADS if arguments.dry_run else WORKLOADS
    report: dict[str, Any] = {"dry_run": arguments.dry_run, "steps": {}}
    report["workload_list"] = [asdict(workload) for workload in workloads]
    for name in arguments.steps:
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            result = {"ok": True, **STEPS[name](bench)}
        except Exception as error:  # the next steps are worth having all the same
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            print(result["error"])
        result["seconds"] = round(time.perf_counter() - start, 1)
        report["steps"][name] = result
        _write(report, arguments.output)
    return 0 if all(step["ok"] for step in report["steps"].values()) else 1


def _write(report: dict[str, Any], output: Path | None) -> None:
    """After each step: a lent machine may be taken away before the last one."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
