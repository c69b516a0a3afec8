# SPDX-License-Identifier: Apache-2.0
"""Steps of ``gpu_suite.py`` with engines: equal tokens; decode rate and capacity."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from gpu import model as gpu_model
from gpu.system import memory_node
from harness.processes import ManagedProcess, ProcessError

HERE = Path(__file__).parent
BATCHES = (1, 8, 32, 64, 128, 256)
LONG_POINT = {"batch": 24, "context": 8192, "steps": 8}
#: Of the nodes that engines share, and of each engine there.
NODE_GIB, ENGINE_GIB = 16.0, 2.0
#: Answers may part where the best two choices were closer than bf16 can tell.
MAX_TIE = 0.05
_ENGINE_TIMEOUT_S, _DRY_TIMEOUT_S = 150.0, 550.0
_PARALLEL_ENGINES = 6
#: Of the card: while others run beside it, and alone beside a node.
_CROWDED, _ALONE = 0.1, 0.7


@dataclass(frozen=True)
class Variant:
    """An engine: model runner, mode, and place of its KV cache."""

    runner: str
    mode: str
    node: str = ""
    micro_batches: int = 1
    points: tuple[dict[str, int], ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        where = self.node or "stock"
        split = "" if self.micro_batches == 1 else f"-{self.micro_batches}mb"
        return f"{self.runner}-{self.mode}-{where}{split}"


EQUALITY = [
    Variant(runner, mode, node)
    for runner in ("v1", "v2")
    for mode in ("eager", "piecewise")
    for node in ("", "cpu", "gpu")
]


def timed_variants() -> list[Variant]:
    """Engines whose tokens per second are compared.

    Steps in two micro-batches run without CUDA graphs. The last engine starts its own
    node on the CPU, with the host's memory.
    """
    points = tuple({"batch": b, "context": 512, "steps": 24} for b in BATCHES)
    few = points[2:5:2]
    return [
        Variant("v2", "piecewise", "", points=points),
        Variant("v2", "piecewise", "cpu", points=points),
        Variant("v2", "piecewise", "gpu", points=points),
        Variant("v1", "eager", "cpu", 1, few),
        Variant("v1", "eager", "cpu", 2, few),
        Variant("v2", "piecewise", "cpu", 2, few),
        Variant("v2", "piecewise", "local", 1, (LONG_POINT,)),
    ]


class Engines:
    """Starts engines on one model and two nodes, which they all use.

    Args:
        device: Device of the engines, and of the node that is not on the CPU.
        is_dry: Tiny, on the CPU, and two engines in place of all.
    """

    def __init__(self, device: torch.device, *, is_dry: bool) -> None:
        self._device = device
        self._is_dry = is_dry
        self._stack = ExitStack()
        self._work = ""
        self._model = Path()
        self._nodes: dict[str, str] = {}

    def __enter__(self) -> Engines:
        self._work = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="attn-offload-suite-")
        )
        self._model = gpu_model.saved(is_dry=self._is_dry)
        if self._device.type == "cuda":
            # What earlier steps left belongs to the engines now.
            gc.collect()
            torch.cuda.empty_cache()
        gib = 0.1 if self._is_dry else NODE_GIB
        cpu = torch.device("cpu")
        for name, device in (("cpu", cpu), ("gpu", self._device)):
            self._nodes[name] = self._stack.enter_context(
                memory_node(self._work, device, kv_cache_gib=gib, name=name)
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, variant: Variant) -> dict[str, Any]:
        """Run an engine and return its results.

        Raises:
            ProcessError: It failed; the message ends with its output.
        """
        # Late: steps before this one need no installed package.
        from vllm_attn_offload.transport.negotiate import ROWS_ARE_SHARED

        config = Path(self._work, f"{variant.name}.config.json")
        output = Path(self._work, f"{variant.name}.json")
        config.write_text(json.dumps(self._config(variant)), "utf-8")
        log = Path(self._work, f"{variant.name}.log")
        engine = ManagedProcess(
            variant.name,
            [sys.executable, HERE / "engine.py", self._model, config, output],
            log,
        )
        engine.finish(_DRY_TIMEOUT_S if self._is_dry else _ENGINE_TIMEOUT_S)
        result: dict[str, Any] = json.loads(output.read_text("utf-8"))
        written = log.read_text("utf-8")
        result["shares_gpu_memory"] = ROWS_ARE_SHARED in written
        result["synchronisations"] = synchronisations(written)
        return result

    def try_all(self, variants: list[Variant], parallel: int) -> dict[str, Any]:
        """Results by name; an engine that fails leaves its error."""

        def attempt(variant: Variant) -> dict[str, Any]:
            try:
                return self.run(variant)
            except ProcessError as error:
                return {"error": str(error)[-1500:]}

        with ThreadPoolExecutor(parallel) as threads:
            results = list(threads.map(attempt, variants))
        return {v.name: result for v, result in zip(variants, results, strict=True)}

    def _config(self, variant: Variant) -> dict[str, Any]:
        options: dict[str, Any] = gpu_model.engine_options(is_dry=self._is_dry)
        if variant.mode == "eager":
            options["enforce_eager"] = True
        elif variant.node:
            options["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
        if variant.node:
            options["attention_offload"] = True
            offload = options["attention_offload_config"] = {
                "num_microbatches": variant.micro_batches
            }
            if variant.node != "local":
                offload["memory_nodes"] = [self._nodes[variant.node]]
                offload["kv_cache_gib"] = NODE_GIB if variant.points else ENGINE_GIB
            if self._is_dry:
                offload["kv_cache_gib"] = 0.02
        elif self._is_dry:
            options["kv_cache_memory_bytes"] = 1 << 24
        if not self._is_dry:
            share = _ALONE if variant.points else _CROWDED
            options["gpu_memory_utilization"] = share
        environment = {"VLLM_USE_V2_MODEL_RUNNER": str(int(variant.runner == "v2"))}
        if not variant.points:  # it takes time, so not where time is taken
            environment["VLLM_GPU_SYNC_CHECK"] = "warn"
        return {
            "environment": environment,
            "options": options,
            "prompts": gpu_model.prompts(),
            "num_tokens": gpu_model.NUM_TOKENS,
            "points": list(variant.points),
        }


def synchronisations(log: str) -> list[str]:
    """Warnings of VLLM_GPU_SYNC_CHECK that name a line of this package."""
    return [
        line
        for line in log.splitlines()
        if "vllm_attn_offload/" in line and "UserWarning" in line and "sync" in line
    ]


def compare_tokens(device: torch.device, *, is_dry: bool) -> dict[str, Any]:
    """Greedy tokens of all variants beside those of the same one without offload.

    Raises:
        RuntimeError: An engine failed, tokens differ where there was no tie, rows
            passed the host without need, or the device was synchronised.
    """
    planned = [variant.name for variant in EQUALITY]
    print("engines: " + ", ".join(planned))
    variants = [EQUALITY[0], EQUALITY[1]] if is_dry else EQUALITY
    with Engines(device, is_dry=is_dry) as started:
        results = started.try_all(variants, 1 if is_dry else _PARALLEL_ENGINES)
    rows, problems = [], []
    for variant in variants:
        found = results[variant.name]
        if "error" in found:
            problems.append(f"{variant.name}: {found['error'][-400:]}")
        elif variant.node:
            stock = results[Variant(variant.runner, variant.mode).name]
            row = {"variant": variant.name, **compare(stock, found)}
            rows.append(row)
            print(row)
            problems += [f"{variant.name}: {text}" for text in row["differences"]]
            if found["shares_gpu_memory"] != (variant.node == "gpu" and not is_dry):
                problems.append(f"{variant.name}: rows pass where they should not")
            problems += found["synchronisations"][:1]
    if problems:
        raise RuntimeError("; ".join(problems))
    return {"planned": planned, "rows": rows, "engines": results}


def compare(stock: dict[str, Any], offload: dict[str, Any]) -> dict[str, Any]:
    """Answers that are identical, and where the others part."""
    identical, ties, differences = 0, [], []
    for index, (ours, theirs) in enumerate(
        zip(offload["tokens"], stock.get("tokens", []), strict=False)
    ):
        pairs = zip(ours["tokens"], theirs["tokens"], strict=True)
        parted = [at for at, (mine, other) in enumerate(pairs) if mine != other]
        if not parted:
            identical += 1
        elif theirs["leads"][parted[0]] < MAX_TIE:
            ties.append([index, parted[0], theirs["leads"][parted[0]]])
        else:
            lead = theirs["leads"][parted[0]]
            differences.append(f"answer {index} parts at {parted[0]}, lead {lead:.3g}")
    if "tokens" not in stock:
        differences.append("there is no stock answer")
    return {"identical": identical, "ties": ties, "differences": differences}


def measure_decode(device: torch.device, *, is_dry: bool) -> dict[str, Any]:
    """Decode tokens/s beside stock, one engine at a time; parts; what pools hold.

    Raises:
        RuntimeError: An engine failed.
    """
    variants = timed_variants()
    planned = [variant.name for variant in variants]
    print("engines: " + ", ".join(planned))
    if is_dry:
        # The engine runs ahead: the first interval is nothing, and of two steps half.
        point = {"batch": 2, "context": 16, "steps": 5}
        variants = [Variant("v1", "eager", "local", 1, (point,))]
    host_share = psutil.virtual_memory().available / 2
    with Engines(device, is_dry=is_dry) as started:
        results = started.try_all(variants, 1)
    _print_rates(results)
    failed = [name for name, result in results.items() if "error" in result]
    if failed:
        raise RuntimeError(f"engines failed: { ({n: results[n] for n in failed}) }")
    shape = gpu_model.DRY_SHAPE if is_dry else gpu_model.LLAMA_8B_SHAPE
    budget = 0.02 * 2**30 if is_dry else host_share
    expected = budget / gpu_model.kv_bytes_per_token(shape, 4 if is_dry else 2)
    found = results[variants[-1].name]["capacity_tokens"]
    print(f"{found:,} tokens; the host's budget holds {expected:,.0f}")
    capacity = {
        "tokens": found,
        "expected_tokens": expected,
        "error": found / expected - 1,
        "largest_batch": {
            name: result["capacity_tokens"] // LONG_POINT["context"]
            for name, result in results.items()
        },
    }
    return {"planned": planned, "engines": results, "capacity": capacity}


def _print_rates(results: dict[str, Any]) -> None:
    for name, result in results.items():
        for point in result.get("points", ()):
            rate, batch = point["tokens_per_s"], point["batch"]
            print(f"{name:<28}{batch:5} x {point['context']:5}{rate:12.1f} tokens/s")
        if "error" in result:
            print(f"{name}: {result['error'][-300:]}")
