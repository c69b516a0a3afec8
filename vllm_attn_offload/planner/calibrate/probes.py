# SPDX-License-Identifier: Apache-2.0
"""Probes of `calibrate` that need no memory node; each returns TOML entries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from statistics import median
from typing import Protocol

import numpy as np
import psutil
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

# Weights and KV must not sit in a cache: a step reads them once.
WORKING_SET_BYTES = 256 << 20

Entry = bool | float | list[list[float]]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Entries for the compute device, a memory node and the network between them.

    `notes` become comments in the file.
    """

    device: dict[str, Entry] = field(default_factory=dict)
    network: dict[str, Entry] = field(default_factory=dict)
    node: dict[str, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Probe(Protocol):
    """One measurement of at most about `budget_s` seconds."""

    title: str

    def run(self, budget_s: float) -> ProbeResult:
        """Measure; returns entries of the hardware file."""


def time_call(
    call: Callable[[], object], device: torch.device, budget_s: float
) -> float:
    """Median seconds of `call` after a warm-up, from three or more calls.

    A call that takes longer than `budget_s` is not repeated.
    """

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    first_s = once()
    if first_s > budget_s:
        return first_s
    end = time.perf_counter() + budget_s
    times = [once() for _ in range(3)]
    while time.perf_counter() < end:
        times.append(once())
    return median(times)


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Fixed seconds and bytes per second of t = fixed + size / bandwidth.

    Weighted by 1 / t, so that small sizes, which carry the fixed part, count. Noise can
    make one part negative: a fixed part becomes 0; without a visible slope, the best
    size is a lower bound on the bandwidth.
    """
    weight = 1 / np.asarray(seconds)
    columns = np.stack([np.ones(len(sizes)), np.asarray(sizes)], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(
        columns * weight[:, None], np.ones(len(sizes)), rcond=None
    )
    per_byte = np.asarray(seconds) / np.asarray(sizes)
    if slope <= 0:
        fixed, slope = min(seconds), per_byte.min()
    elif fixed < 0:
        fixed, slope = 0.0, np.median(per_byte)
    return float(fixed), float(1 / slope)


@dataclass(slots=True)
class MemoryProbe:
    """Memory capacity and read bandwidth."""

    device: torch.device
    title: str = "memory"

    def run(self, budget_s: float) -> ProbeResult:
        """Time the sum of a tensor far larger than the caches."""
        data = torch.ones(WORKING_SET_BYTES // 4, device=self.device)
        seconds = time_call(data.sum, self.device, budget_s)
        if self.device.type == "cpu":
            total = psutil.virtual_memory().total
        else:
            total = torch.cuda.get_device_properties(self.device).total_memory
        return ProbeResult(
            {"memory_gb": total / 1e9, "memory_gbps": WORKING_SET_BYTES / seconds / 1e9}
        )


@dataclass(slots=True)
class GemmProbe:
    """GEMM curve: seconds per 1e9 bytes of weights, by rows.

    `shapes` are (out, in) of one layer's weight matrices; copies of the layer fill the
    working set and are used in turn.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 256)
    title: str = "GEMM rates"
    _turn: Iterator[list[torch.Tensor]] | None = None

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's weights."""
        return sum(n * k for n, k in self.shapes) * self.dtype.itemsize

    def layer_call(self, rows: int) -> Callable[[], None]:
        """A call that multiplies `rows` rows with the next layer's matrices."""
        if self._turn is None:
            copies = max(WORKING_SET_BYTES // self.layer_bytes, 1)
            self._turn = cycle(
                [[self._weight(n, k) for n, k in self.shapes] for _ in range(copies)]
            )
        turn = self._turn
        inputs = [self._weight(rows, k) for _, k in self.shapes]

        def call() -> None:
            for x, w in zip(inputs, next(turn), strict=True):
                linear(x, w)

        return call

    def run(self, budget_s: float) -> ProbeResult:
        """Time one layer's matrices at each number of rows."""
        layer_params = sum(n * k for n, k in self.shapes)
        layer_bytes = self.layer_bytes
        curve, tflops = [], 0.0
        for rows in self.rows:
            call = self.layer_call(rows)
            seconds = time_call(call, self.device, budget_s / len(self.rows))
            curve.append([float(rows), seconds / layer_bytes * 1e9])
            tflops = max(tflops, 2 * layer_params * rows / seconds / 1e12)
        return ProbeResult({"gemm_curve": curve, "tflops": tflops})

    def _weight(self, rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, device=self.device) / columns**0.5
        return weight.to(self.dtype)


@dataclass(slots=True)
class AttentionProbe:
    """Decode attention by torch: bytes of KV per second, and a call's fixed cost."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    title: str = "local attention"

    def run(self, budget_s: float) -> ProbeResult:
        """Time batches and contexts from 128 tokens to half of the working set."""
        cases = [(1, 128), (1, 1024), (4, 512), (4, 2048), (8, 4096)]
        sizes, seconds = [], []
        for batch, tokens in cases:
            shape = batch, self.num_kv_heads, tokens, self.head_size
            kv_bytes = 2 * torch.Size(shape).numel() * self.dtype.itemsize
            copies = max(WORKING_SET_BYTES // 2 // kv_bytes, 1)
            # A few thousand small copies would only measure the allocator.
            caches = cycle([self._cache(shape) for _ in range(min(copies, 64))])
            q = torch.randn(batch, self.num_heads, 1, self.head_size).to(
                self.device, self.dtype
            )

            def call(
                q: torch.Tensor = q,
                caches: cycle[tuple[torch.Tensor, torch.Tensor]] = caches,
            ) -> None:
                scaled_dot_product_attention(q, *next(caches), enable_gqa=True)

            sizes.append(kv_bytes)
            seconds.append(time_call(call, self.device, budget_s / len(cases)))
        fixed_s, bandwidth = fit_line(sizes, seconds)
        return ProbeResult(
            {"attention_gbps": bandwidth / 1e9, "attention_call_us": fixed_s * 1e6}
        )

    def _cache(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = torch.randn((2, *shape)).to(self.device, self.dtype).unbind()
        return k, v
