# SPDX-License-Identifier: Apache-2.0
"""Measure memory nodes: latency and bandwidth of the exchange, speed of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import numpy.typing as npt

from vllm_attn_offload.client.partition import choose_partition
from vllm_attn_offload.planner.calibrate.node_session import LayerTime, NodeSession
from vllm_attn_offload.planner.calibrate.probes import Entry, ProbeResult
from vllm_attn_offload.planner.model.shape import ModelShape, gqa_layers
from vllm_attn_offload.protocol.geometry import (
    Dtype,
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)
from vllm_attn_offload.protocol.layer import DTYPE_BYTES
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

# Requests x tokens. The first is the emptiest exchange, the last the largest frames.
GRID = (
    *((1, 16), (1, 512), (1, 2048), (4, 128), (4, 1024), (8, 2048), (16, 16)),
    *((16, 512), (32, 128), (32, 512), (128, 16)),
)
QUICK_GRID = ((1, 16), (1, 256), (8, 64), (8, 256), (32, 16))
MAX_LAYERS = 32


def model_geometry(
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: Dtype,
    block_size: int,
) -> SessionGeometry:
    """Equal layers in one KV cache group; at most MAX_LAYERS, as more add nothing."""
    layers = [
        LayerGeometry(
            name=f"layers.{index}",
            group=0,
            storage=index,
            num_query_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            v_head_size=head_size,
            softmax_scale=head_size**-0.5,
        )
        for index in range(min(num_layers, MAX_LAYERS))
    ]
    return SessionGeometry(dtype, [KVGroup(block_size)], layers)


def fit_nonnegative(
    columns: Sequence[Sequence[float]], seconds: Sequence[float]
) -> list[float]:
    """Coefficients >= 0 of sum(c_i x column_i) = seconds, by relative least squares.

    Every subset of the columns is tried, as there are three at most.
    """
    y = np.asarray(seconds)
    scaled = np.asarray(columns) / y
    best, best_error = np.zeros(len(columns)), float("inf")
    for size in range(1, len(columns) + 1):
        for chosen in combinations(range(len(columns)), size):
            part: npt.NDArray[np.float64] = scaled[list(chosen)].T
            found, *_ = np.linalg.lstsq(part, np.ones(len(y)), rcond=None)
            error = float(((part @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < best_error:
                best, best_error = np.zeros(len(columns)), error
                best[list(chosen)] = found
    return best.tolist()


@dataclass(slots=True)
class NodeProbe:
    """Exchange of one layer over batch and context, on all nodes of an engine.

    A layer takes latency + rows x wire bytes / bandwidth on the way, and on the node
    call + rows x row + KV bytes / bandwidth (Lamina, arXiv 2405.01814, section 3, with
    the fixed parts that a real exchange has).

    Args:
        addresses: Running memory nodes.
        geometry: Layers of the model.
        between: For a number of rows, the call to make before each exchange.
        grid: (requests, tokens of each) of the points.
        credentials: Token and certificates for the nodes.
    """

    addresses: Sequence[str]
    geometry: SessionGeometry
    between: Callable[[int], Callable[[], object]]
    grid: Sequence[tuple[int, int]] = GRID
    credentials: Credentials = NO_CREDENTIALS
    title: str = "memory nodes"
    points: list[tuple[int, int, LayerTime]] = field(default_factory=list)

    def run(self, budget_s: float) -> ProbeResult:
        """Measure the grid and fit both parts.

        Raises:
            MemoryNodeError: A node is gone, or refuses.
            ValueError: The nodes hold too little.
        """
        tokens = max(b * _rounded(c, self.geometry) for b, c in self.grid)
        most = max(b for b, _ in self.grid)
        session = NodeSession(
            self.addresses, self.geometry, tokens, most, self.credentials
        )
        try:
            for batch, context in self.grid:
                between = self.between(batch)
                once = session.measure(batch, context, 1, between)
                layer_s = once.exchange_s * len(self.geometry.layers)
                fitting = int(budget_s / len(self.grid) / layer_s)
                steps = min(max(fitting, 2), 8)
                time = session.measure(batch, context, steps, between)
                self.points.append((batch, context, time))
            capacity, devices = session.capacity_bytes, session.devices
        finally:
            session.close()
        return self._result(capacity, devices)

    def _row_bytes(self) -> float:
        """Bytes that one row exchanges with all nodes, in the planner's own terms."""
        layer = self.geometry.layers[0]
        heads = layer.num_query_heads, layer.num_kv_heads, layer.head_size
        item = DTYPE_BYTES[self.geometry.dtype]
        shape = ModelShape("", 0, (gqa_layers(1, *heads),), 0, 0, activation_bytes=item)
        num_nodes = len(self.addresses)
        kind, _ = choose_partition("auto", self.geometry, num_nodes)
        return shape.wire_bytes(num_nodes, kind)

    def _result(self, capacity: int, devices: list[str]) -> ProbeResult:
        layer = self.geometry.layers[0]
        kv = layer.num_kv_heads * (layer.head_size + layer.v_head_size)
        kv *= DTYPE_BYTES[self.geometry.dtype]
        rows = [float(batch) for batch, _, _ in self.points]
        ones = [1.0] * len(rows)
        num_bytes = [b * c * kv / len(self.addresses) for b, c, _ in self.points]
        attend = [time.attend_s for _, _, time in self.points]
        call_s, row_s, per_byte = fit_nonnegative([ones, rows, num_bytes], attend)
        moved = [b * self._row_bytes() for b in rows]
        wire = [time.exchange_s - time.attend_s for _, _, time in self.points]
        latency_s, per_moved = fit_nonnegative([ones, moved], wire)
        flops_per_byte = 4 * layer.num_query_heads * layer.head_size / kv
        attention_gbps = 1e-9 / max(per_byte, 1e-15)
        node: dict[str, Entry] = {
            "attention_only": True,
            "memory_gb": capacity / 1e9,
            "memory_gbps": attention_gbps,
            "tflops": attention_gbps * flops_per_byte / 1e3,
            "attention_gbps": attention_gbps,
            "attention_call_us": call_s * 1e6,
            "attention_row_us": row_s * 1e6,
        }
        network: dict[str, Entry] = {
            "gbps": 8e-9 / max(per_moved, 1e-15),
            "latency_us": latency_s * 1e6,
            "efficiency": 1.0,
        }
        notes = [f"{len(devices)} memory node(s): {'; '.join(devices)}"]
        notes += ["requests x tokens: us per layer, of which on the node"]
        notes += [
            f"{b} x {c}: {t.exchange_s * 1e6:.0f}, {t.attend_s * 1e6:.0f}"
            f" ({b * c * kv / len(self.addresses) / t.attend_s / 1e9:.1f} GB/s of KV)"
            for b, c, t in self.points
        ]
        return ProbeResult(network=network, node=node, notes=notes)


def _rounded(context: int, geometry: SessionGeometry) -> int:
    """Tokens of the blocks that hold `context`."""
    block_size = geometry.groups[0].block_size
    return -(-context // block_size) * block_size
