# SPDX-License-Identifier: Apache-2.0
"""The engines of ``gpu_suite.py``, and the nodes that they share."""

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

import torch
from gpu import model as gpu_model
from gpu.system import memory_node
from harness.processes import READY_FD, ManagedProcess, ProcessError

HERE = Path(__file__).parent
#: KV cache of an engine: one whose tokens are compared, a timed one, and one with a
#: node of its own. Stock has as much as those on the nodes, which hold four timed ones.
COMPARED_GIB, TIMED_GIB, LOCAL_GIB = 2.0, 8.0, 32.0
_NODE_GIB, _DRY_GIB = 4 * TIMED_GIB, 0.02
_TIMEOUT_S, _DRY_TIMEOUT_S = 240.0, 550.0
#: Of the card, because other engines run beside each.
_SHARE = 0.1


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


class Engines:
    """Starts engines on one model and two nodes, which they all use.

    Args:
        device: Device of the engines, and of the node that is not on the CPU.
        is_dry: Tiny, on the CPU, and two engines in place of all.
        logs: Folder that keeps what nodes and engines write; None: it goes with them.
    """

    def __init__(
        self, device: torch.device, *, is_dry: bool, logs: Path | None
    ) -> None:
        self._device = device
        self._is_dry = is_dry
        self._timeout_s = _DRY_TIMEOUT_S if is_dry else _TIMEOUT_S
        self._logs = logs or Path()
        self._stack = ExitStack()
        self._work = ""
        self._model = Path()
        self._nodes: dict[str, str] = {}

    def __enter__(self) -> Engines:
        self._work = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="attn-offload-suite-")
        )
        self._logs = Path(self._work) / self._logs
        self._model = gpu_model.saved(is_dry=self._is_dry)
        if self._device.type == "cuda":
            # What earlier steps left belongs to the engines now.
            gc.collect()
            torch.cuda.empty_cache()
        gib = 0.1 if self._is_dry else _NODE_GIB
        cpu = torch.device("cpu")
        for name, device in (("cpu", cpu), ("gpu", self._device)):
            node = memory_node(
                self._work, device, kv_cache_gib=gib, name=name, logs=self._logs
            )
            self._nodes[name] = self._stack.enter_context(node)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, variants: list[Variant], parallel: int) -> dict[str, Any]:
        """Run engines, some at a time.

        Returns:
            Results by name; an engine that fails leaves its error.
        """
        with ThreadPoolExecutor(parallel) as threads:
            results = list(threads.map(self._run, variants))
        return {v.name: result for v, result in zip(variants, results, strict=True)}

    def run_in_turns(self, variants: list[Variant]) -> dict[str, Any]:
        """Start all engines, then let one after the other time its points.

        Returns:
            As `run`.
        """
        processes = [self._start(variant) for variant in variants]
        try:
            with ThreadPoolExecutor(len(processes)) as threads:
                started = list(threads.map(self._wait, processes))
            return {
                variant.name: error or self._finish(variant, process)
                for variant, process, error in zip(
                    variants, processes, started, strict=True
                )
            }
        finally:
            for process in processes:
                process.kill()

    def _run(self, variant: Variant) -> dict[str, Any]:
        process = self._start(variant)
        return self._wait(process) or self._finish(variant, process)

    def _start(self, variant: Variant) -> ManagedProcess:
        config, output = self._files(variant)
        config.write_text(json.dumps(self._config(variant)), "utf-8")
        script = HERE / "engine.py"
        return ManagedProcess(
            variant.name,
            [sys.executable, script, self._model, config, output, READY_FD],
            self._logs / f"{variant.name}.log",
        )

    def _wait(self, process: ManagedProcess) -> dict[str, Any]:
        """Wait for the engine's tokens; its error if there is one."""
        try:
            process.read_line(self._timeout_s)
        except ProcessError as error:
            process.kill()
            return {"error": str(error)[-1500:]}
        return {}

    def _finish(self, variant: Variant, process: ManagedProcess) -> dict[str, Any]:
        # Late: steps before this one need no installed package.
        from vllm_attn_offload.transport.negotiate import ROWS_ARE_SHARED

        try:
            process.tell("go on")
            process.finish(self._timeout_s)
        except ProcessError as error:
            return {"error": str(error)[-1500:]}
        except OSError as error:  # it ended while it waited for its turn
            return {"error": f"{error}: {process.log_tail()[-1500:]}"}
        result: dict[str, Any] = json.loads(self._files(variant)[1].read_text("utf-8"))
        written = (self._logs / f"{variant.name}.log").read_text("utf-8")
        result["shares_gpu_memory"] = ROWS_ARE_SHARED in written
        result["synchronisations"] = synchronisations(written)
        return result

    def _files(self, variant: Variant) -> tuple[Path, Path]:
        """Its configuration and its results."""
        return (
            Path(self._work, f"{variant.name}.config.json"),
            Path(self._work, f"{variant.name}.json"),
        )

    def _config(self, variant: Variant) -> dict[str, Any]:
        options: dict[str, Any] = gpu_model.engine_options(is_dry=self._is_dry)
        if variant.mode == "eager":
            options["enforce_eager"] = True
        elif variant.node:
            options["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
        gib = self._kv_cache_gib(variant)
        if variant.node:
            options["attention_offload"] = True
            offload = options["attention_offload_config"] = {
                "num_microbatches": variant.micro_batches,
                "kv_cache_gib": gib,
            }
            if variant.node != "local":
                offload["memory_nodes"] = [self._nodes[variant.node]]
        else:
            # Profiling fails where engines beside it end.
            options["kv_cache_memory_bytes"] = int(gib * 2**30)
        if not self._is_dry:
            options["gpu_memory_utilization"] = _SHARE
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

    def _kv_cache_gib(self, variant: Variant) -> float:
        if self._is_dry:
            return _DRY_GIB
        if variant.node == "local":
            return LOCAL_GIB
        return TIMED_GIB if variant.points else COMPARED_GIB


def synchronisations(log: str) -> list[str]:
    """Warnings of VLLM_GPU_SYNC_CHECK that name a line of this package."""
    return [
        line
        for line in log.splitlines()
        if "vllm_attn_offload/" in line and "UserWarning" in line and "sync" in line
    ]
