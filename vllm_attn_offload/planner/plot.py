# SPDX-License-Identifier: Apache-2.0
"""The picture of `plan --plot`: tokens per dollar over ratio, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_attn_offload.planner.estimate.compare import Ratio
from vllm_attn_offload.planner.estimate.question import Question
from vllm_attn_offload.planner.hardware.device import Device
from vllm_attn_offload.planner.model.shape import ModelShape


def new_figure(num_axes: int, title: str) -> tuple[Any, Any]:
    """A figure with `num_axes` axes in a row, without a display.

    Raises:
        ValueError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"Plots need matplotlib, which is not importable ({error}). It comes with "
            'the "plots" extra. Run: pip install matplotlib'
        ) from error
    figure = Figure(figsize=(6.4 * num_axes, 4.2), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, num_axes)


def plot_plan(question: Question, ratios: Sequence[Ratio], path: Path) -> None:
    """Write the PNG.

    Raises:
        ValueError: No matplotlib, or the file cannot be written.
    """
    shape, offload = question.shape, question.offload
    title = f"{shape.name}, {question.workload.context:,.0f} tokens of context"
    figure, (left, right) = new_figure(2, title)
    _plot_ratios(left, ratios)
    _plot_roofline(right, shape, [offload.compute.device, offload.memory.device])
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ValueError(
            f"Cannot write the plot to {path}: {error}. The folder must exist and be "
            "writable. Give another path."
        ) from error


def _plot_ratios(axes: Any, ratios: Sequence[Ratio]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    alone: set[str] = set()
    for compute, memory, estimate in ratios:
        per_dollar = 3600 / estimate.cost_per_token / 1e6
        if memory is not None:
            point = (memory.count / compute.count, per_dollar)
            lines.setdefault(str(compute), []).append(point)
        elif compute.device.name not in alone:
            # Cheapest first: one line for the best number of each kind.
            alone.add(compute.device.name)
            axes.axhline(per_dollar, color="0.7", linestyle=":")
            axes.annotate(estimate.label, (0, per_dollar), fontsize=8, color="0.3")
    for label, points in sorted(lines.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", label=label)
    is_priced = all(estimate.usd_per_hour is not None for _, _, estimate in ratios)
    unit = "USD" if is_priced else "device hour"
    axes.set(xlabel="memory devices per compute device", ylabel=f"Mtoken per {unit}")
    axes.set_title(f"Throughput per {unit} (dotted: homogeneous)", fontsize=10)
    if lines:
        axes.legend(fontsize=8)


def _plot_roofline(axes: Any, shape: ModelShape, devices: Sequence[Device]) -> None:
    intensity = np.logspace(-1, 4, 200)
    for device in devices:
        peak = np.minimum(intensity * device.memory_gbps / 1e3, device.tflops)
        axes.loglog(intensity, peak, label=device.name)
    attention = shape.attention_flops(1) / shape.kv_bytes(1)
    axes.axvline(attention, color="k", linestyle="--")
    axes.annotate("attention", (attention, 0.2), rotation=90, fontsize=8)
    for rows in (1, 16, 64, 256):
        model = shape.flops_per_token * rows / shape.streamed_bytes(rows)
        axes.axvline(model, color="0.7", linestyle=":")
        axes.annotate(f"model, B={rows}", (model, 0.2), rotation=90, fontsize=8)
    axes.set(xlabel="flop per byte", ylabel="TFLOP/s", ylim=(0.1, None))
    axes.set_title("Roofline (datasheet)", fontsize=10)
    axes.legend(fontsize=8)
