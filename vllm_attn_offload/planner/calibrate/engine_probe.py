# SPDX-License-Identifier: Apache-2.0
"""Time the real engine in a process of its own, and split its step into parts."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from vllm_attn_offload.planner.calibrate.node_probe import fit_nonnegative
from vllm_attn_offload.planner.calibrate.probes import Entry, ProbeResult
from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.cost_model import interpolate
from vllm_attn_offload.planner.hardware.device import Device
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.shape import ModelShape

CHILD = "vllm_attn_offload.planner.calibrate.time_engine"
BATCHES = (1, 2, 4, 8, 16, 32)
QUICK_BATCHES = (1, 8, 32)
TIMEOUT_S = 600.0
# Noise can leave less than nothing of a part.
MIN_S = 1e-6
MAX_MODEL_LEN = 512


@dataclass(frozen=True, slots=True)
class EngineTime:
    """Seconds of a decode step, its layers and their exchanges, at `context` tokens."""

    step_s: float
    layers_s: float
    exchange_s: float
    context: float

    @property
    def outside_s(self) -> float:
        """Scheduling, embedding, output head, sampling."""
        return max(self.step_s - self.layers_s, 0.0)

    @property
    def compute_s(self) -> float:
        """Layers without their exchanges."""
        return max(self.layers_s - self.exchange_s, 0.0)


@dataclass(slots=True)
class EngineProbe:
    """Per-step and per-layer overheads, and GEMM rates, of vLLM itself.

    Args:
        model: Model that vLLM serves; its weights are not read.
        dtype: vLLM's ``dtype`` option.
        shape: Sizes of `model` in that dtype.
        addresses: Memory nodes that attend.
        device: This one as torch alone measured it, with a GEMM curve.
        node: Memory node as NodeProbe measured it.
        network: Network as NodeProbe measured it.
        cpus: CPUs of the worker; empty: vLLM's choice.
        trust: Options of the engine that name its token and certificates.
    """

    model: str
    dtype: str
    shape: ModelShape
    addresses: Sequence[str]
    device: Device
    node: Device
    network: Network
    cpus: str
    trust: Mapping[str, str] = field(default_factory=dict)
    batches: Sequence[int] = BATCHES
    title: str = "the real engine (starts vLLM)"

    def run(self, budget_s: float) -> ProbeResult:
        """Start the engine, time its steps, end it.

        Raises:
            ValueError: The engine does not start or ends early.
        """
        request = {
            "options": self._options(),
            "batches": list(self.batches),
            "seconds_per_batch": budget_s / len(self.batches),
            "warm_up_s": budget_s,
        }
        variables = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        if self.cpus:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = self.cpus
        times = [(b, EngineTime(**t)) for b, t in _ask_child(request, variables)]
        return ProbeResult(
            device=self.split(times),
            network={"latency_us": self.latency_us(times)},
            notes=_notes(times),
        )

    def latency_us(self, times: Sequence[tuple[int, EngineTime]]) -> float:
        """Microseconds of an exchange's fixed part, where the node has slept longer.

        What is left of the exchanges after attention and bytes, by the node and the
        network as measured; the median over the batches.
        """
        num_nodes = len(self.addresses)
        kv_heads = self.shape.layers[0].num_kv_heads
        partition = "blocks" if kv_heads % num_nodes else "heads"
        free = replace(self.network, latency_us=0.0)
        left = [
            t.exchange_s
            - cost.attention_time(self.shape, self.node, num_nodes, b, t.context)
            - cost.wire_time(self.shape, free, b, num_nodes, 1, partition)
            for b, t in times
        ]
        return max(median(left), 0.0) / self.shape.num_layers * 1e6

    def split(self, times: Sequence[tuple[int, EngineTime]]) -> dict[str, Entry]:
        """Overheads and the GEMM curve that together give the measured step.

        What layers take beyond their GEMMs by torch, and recurrent states, at every
        batch is their overhead.
        The curve is then the engine's own; past its batches it follows torch's.
        Outside the layers the output head is read, the rest is overhead.
        """
        shape, head_bytes = self.shape, self.shape.lm_head_bytes
        gemm = self.device.gemm_curve
        compute_s = {
            b: max(t.compute_s - cost.state_time(shape, self.device, 1, b), 0.0)
            for b, t in times
        }
        layer_bytes = {b: shape.streamed_bytes(b) - head_bytes for b, _ in times}
        beyond = [
            seconds - layer_bytes[b] / 1e9 * interpolate(gemm, b)
            for b, seconds in compute_s.items()
        ]
        overhead_s = max(min(beyond), 0.0)
        curve = [
            [float(b), max(seconds - overhead_s, MIN_S) / layer_bytes[b] * 1e9]
            for b, seconds in compute_s.items()
        ]
        last_rows, last = curve[-1]
        scale = last / interpolate(gemm, last_rows)
        curve += [[r, s * scale] for r, s in gemm if r > last_rows]
        engine_curve = [(r, s) for r, s in curve]
        left = [
            max(t.outside_s - head_bytes / 1e9 * interpolate(engine_curve, b), MIN_S)
            for b, t in times
        ]
        columns = [[1.0] * len(times), [float(b) for b, _ in times]]
        step_s, row_s = fit_nonnegative(columns, left)
        return {
            "gemm_curve": curve,
            "step_overhead_us": step_s * 1e6,
            "row_overhead_us": row_s * 1e6,
            "layer_overhead_us": overhead_s / shape.num_mixing_layers * 1e6,
        }

    def _options(self) -> dict[str, object]:
        most = max(self.batches)
        tokens = 2.0 * most * MAX_MODEL_LEN
        pool_gib = tokens * self.shape.kv_bytes_per_token / len(self.addresses)
        offload: dict[str, object] = {
            "memory_nodes": list(self.addresses),
            "kv_cache_gib": max(pool_gib / (1 << 30), 0.25),
            "num_microbatches": 1,
            **self.trust,
        }
        has_tokenizer = not Path(self.model).is_dir() or any(
            Path(self.model).glob("tokenizer*")
        )
        return {
            "model": self.model,
            "dtype": self.dtype,
            "load_format": "dummy",
            "skip_tokenizer_init": not has_tokenizer,
            "enforce_eager": True,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": most,
            "max_num_batched_tokens": 2048,
            "attention_offload": True,
            "attention_offload_config": offload,
        }


def _notes(times: Sequence[tuple[int, EngineTime]]) -> list[str]:
    lines = ["engine, eager: batch: ms per step, of which layers, of which exchanges"]
    lines += [
        f"{b}: {t.step_s * 1e3:.2f}, {t.layers_s * 1e3:.2f}, {t.exchange_s * 1e3:.2f}"
        for b, t in times
    ]
    return lines


def _ask_child(
    request: dict[str, object], variables: dict[str, str]
) -> list[tuple[int, dict[str, float]]]:
    """Run the child with a deadline; what it prints is shown if it fails."""
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+") as log, os.fdopen(read) as answers:
        child = subprocess.Popen(
            # -P: a checkout's triton_kernels/ in the working directory is not vLLM's.
            [sys.executable, "-P", "-m", CHILD, str(write), json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(write,),
            env=os.environ | variables,
            start_new_session=True,
        )
        os.close(write)
        try:
            readable, _, _ = select.select([answers], [], [], TIMEOUT_S)
            line = answers.readline() if readable else ""
            if line:
                child.wait(TIMEOUT_S)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if not line:
            log.seek(0)
            lines = log.read().splitlines()
            # vLLM's processes fail one after another; the first one knows why.
            causes = [text for text in lines if re.search(r"\wError: ", text)][:1]
            tail = "\n".join([*causes, *lines[-5:]])
            raise ValueError(
                f"vLLM gave no times within {TIMEOUT_S:g} s or ended early. --model "
                "needs a model that vLLM can serve here with attention offloading. "
                f"Leave --model out, or see the end of its log:\n{tail}"
            )
    return [(int(batch), parts) for batch, parts in json.loads(line)]
