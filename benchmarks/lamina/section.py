# SPDX-License-Identifier: Apache-2.0
"""Models, hardware, traces and the table type of paper.py's sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_attn_offload.planner.estimate.deployment import (
    Estimate,
    evaluate_homogeneous,
    evaluate_offload,
)
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.estimate.traces import Request, read_trace, summarize
from vllm_attn_offload.planner.estimate.workload import Workload
from vllm_attn_offload.planner.hardware.catalogue import load_catalogue
from vllm_attn_offload.planner.hardware.device import Device
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.shape import ModelShape, gqa_layers
from vllm_attn_offload.planner.report import format_table

CATALOGUE = load_catalogue()
H100, H20 = CATALOGUE.device("H100"), CATALOGUE.device("H20")
PAPER_PRICES, CLOUD_PRICES = "lamina-table-1", "cloud-2026"
FHBN = Network("FHBN", 400, latency_us=33.0, efficiency=0.914)
NCCL = Network("NCCL", 400, latency_us=66.6, efficiency=0.71)
# Decode-weighted mean context of the public traces, used when none is given.
KNOWN_CONTEXTS = {"Azure-Conv": 1226.5, "Azure-Code": 2130.4, "Kimi-Conv": 13125.4}


def dense(
    name: str,
    weights_gb: float,
    layers: int,
    hidden: int,
    heads: int,
    queries_per_kv: int = 1,
) -> ModelShape:
    """A model of Table 3 in FP16: half as many parameters as bytes."""
    attention = (gqa_layers(layers, heads, heads // queries_per_kv, hidden // heads),)
    return ModelShape(name, hidden, attention, weights_gb * 1e9 / 2, weights_gb * 1e9)


LLAMA_7B = dense("LLaMA-7B", 13.5, 32, 4096, 32)
LLAMA_13B = dense("LLaMA-13B", 26.0, 40, 5120, 40)
LLAMA_33B = dense("LLaMA-33B", 64.7, 60, 6656, 52)
LLAMA_65B = dense("LLaMA-65B", 130.1, 80, 8192, 64)
LLAMA3_70B = dense("LLaMA3-70B", 137.5, 80, 8192, 64, queries_per_kv=8)
# Table 5: model, compute and memory devices, H100s of about the same cost.
TABLE_5 = [(LLAMA_33B, 1, 2, 2), (LLAMA_65B, 2, 4, 4), (LLAMA3_70B, 2, 4, 4)]


@dataclass
class Section:
    """One published result: a table, remarks, and a plot."""

    key: str
    title: str
    header: list[str]
    rows: list[list[str]]
    remarks: list[str]
    plot: Callable[[Any], None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Title, table and remarks."""
        remarks = "".join(f"\n- {remark}" for remark in self.remarks)
        return f"## {self.title}\n\n{format_table(self.header, self.rows)}\n{remarks}\n"


@dataclass(frozen=True)
class Trace:
    """A trace: mean context, weighted by decode steps, and requests where known."""

    name: str
    context: float
    requests: tuple[Request, ...] = ()


def usd(device: Device, count: int, prices: str = PAPER_PRICES) -> float:
    """USD per hour of `count` devices."""
    return count * device.usd_per_hour(prices)


def load_traces(paths: Sequence[Path]) -> list[Trace]:
    """The given files, or the known means of the public ones."""
    if not paths:
        return [Trace(name, context) for name, context in KNOWN_CONTEXTS.items()]
    read = [(path.stem, tuple(read_trace(path))) for path in paths]
    return [Trace(name, summarize(rs).context, rs) for name, rs in read]


def estimates(
    model: ModelShape, a: int, b: int, t: int, context: float, is_ideal: bool
) -> tuple[Estimate, Estimate]:
    """The offloaded deployment (better of n = 1, 2) and its Table 5 opponent."""
    h100, h20 = (d.ideal() if is_ideal else d for d in (H100, H20))
    network = replace(FHBN, latency_us=0.0, gbps=1e9) if is_ideal else FHBN
    load = Workload(context, 1, 1, prefill="none")
    offload = Offload(DeviceCount(h100, a), DeviceCount(h20, b), network)
    both = [
        evaluate_offload(model, offload, load, usd(H100, a) + usd(H20, b), n)
        for n in (1, 2)
    ]
    homogeneous = evaluate_homogeneous(model, DeviceCount(h100, t), load, usd(H100, t))
    return max(both, key=lambda e: e.tokens_per_s), homogeneous
