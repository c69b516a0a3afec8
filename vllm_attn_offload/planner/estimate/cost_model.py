# SPDX-License-Identifier: Apache-2.0
"""Time, traffic and capacity of decoding, in closed form. Seconds and bytes throughout.

Symbols as in Lamina (arXiv 2405.01814v2) section 3: B rows, l context, d hidden size,
L layers, e element size, N parameters, G query heads per KV head.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from vllm_attn_offload.planner.hardware.device import Device
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.shape import ModelShape

# Share of device memory that weights and KV may fill; vLLM's default for GPUs.
MEMORY_FRACTION = 0.9


def interpolate(curve: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through `curve` (sorted by x); past the end in proportion to x.

    The proportion is right for the one use there is, GEMM time over rows: beyond the
    last point a GEMM is compute-bound, so its time grows with the rows.
    """
    if x <= curve[0][0]:
        return curve[0][1]
    if x >= curve[-1][0]:
        return curve[-1][1] * x / curve[-1][0]
    i = bisect_right([point[0] for point in curve], x)
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def linear_time(device: Device, num_bytes: float, flops: float, rows: float) -> float:
    """Non-attention time of one device: roofline max(bytes / bandwidth, flops / peak).

    Lamina section 3.1: 2 N B flops over e N + 2 e B d bytes. A calibrated device uses
    its measured seconds per byte of weights at `rows` instead.
    """
    if device.gemm_curve:
        return num_bytes / 1e9 * interpolate(device.gemm_curve, rows)
    bandwidth = device.memory_gbps * 1e9 * device.memory_efficiency
    return max(
        num_bytes / bandwidth,
        flops / (device.tflops * 1e12 * device.compute_efficiency),
    )


def allreduce_time(shape: ModelShape, device: Device, tp: int, rows: float) -> float:
    """Two ring all-reduces of B d elements per layer over `tp` ranks.

    Each moves 2 (t-1)/t of its payload per rank in 2 (t-1) hops (Patarasuk and Yuan,
    "Bandwidth optimal all-reduce algorithms", 2009).
    """
    if tp == 1:
        return 0.0
    payload = rows * shape.hidden_size * shape.activation_bytes
    once = 2 * (tp - 1) / tp * payload / (device.link_gbps * 1e9)
    once += 2 * (tp - 1) * device.link_latency_us * 1e-6
    return 2 * shape.num_mixing_layers * once


def model_time(shape: ModelShape, device: Device, tp: int, rows: float) -> float:
    """Everything but attention for a token each of `rows` requests."""
    layers_s = layers_time(shape, device, tp, rows)
    states_s = state_time(shape, device, tp, rows)
    return layers_s + states_s + overhead_time(shape, device, tp, rows)


def layers_time(shape: ModelShape, device: Device, tp: int, rows: float) -> float:
    """t_m: layers without attention for one (micro-)batch of `rows` on `tp` devices."""
    activations = 2 * shape.activation_bytes * rows * shape.hidden_size
    step = linear_time(
        device,
        (shape.streamed_bytes(rows) - shape.lm_head_bytes + activations) / tp,
        (shape.flops_per_token - 2 * shape.lm_head_params) * rows / tp,
        rows,
    )
    overhead_s = shape.num_mixing_layers * device.layer_overhead_us * 1e-6
    return step + allreduce_time(shape, device, tp, rows) + overhead_s


def state_time(shape: ModelShape, device: Device, tp: int, rows: float) -> float:
    """Reading and writing the recurrent states of `rows` requests on `tp` devices."""
    bandwidth = device.memory_gbps * 1e9 * device.memory_efficiency
    return 2 * rows * shape.state_bytes / (bandwidth * tp)


def overhead_time(shape: ModelShape, device: Device, tp: int, rows: float) -> float:
    """Output head, sampling and scheduling: once per step, and hidden by nothing.

    A step's micro-batches are its layers; the rest sees all `rows` requests at once.
    """
    head_s = linear_time(
        device, shape.lm_head_bytes / tp, 2 * shape.lm_head_params * rows / tp, rows
    )
    return head_s + (device.step_overhead_us + rows * device.row_overhead_us) * 1e-6


def attention_time(
    shape: ModelShape, device: Device, num_devices: float, rows: float, context: float
) -> float:
    """t_a: attention of `rows` requests with `context` tokens, spread evenly.

    Bytes over bandwidth, or flops over peak where the query heads per KV head make it
    compute-bound (MLA on a device with few flops, or a CPU). Lamina section 3.2. A
    measured `attention_gbps` contains the flops of the geometry it was measured in.
    Every layer call has a fixed part, and one per request (storing k and v, starting
    its softmax).
    """
    kv_bytes = rows * shape.kv_read_bytes(context)
    if device.attention_gbps is not None:
        work = kv_bytes / (device.attention_gbps * 1e9)
    else:
        bandwidth = device.memory_gbps * 1e9 * device.attention_efficiency
        peak = device.tflops * 1e12 * device.compute_efficiency
        work = max(kv_bytes / bandwidth, rows * shape.attention_flops(context) / peak)
    call_us = device.attention_call_us + rows * device.attention_row_us
    return work / num_devices + shape.num_layers * call_us * 1e-6


def wire_time(
    shape: ModelShape,
    network: Network,
    rows: float,
    num_nodes: int,
    num_ports: float,
    partition: str = "heads",
) -> float:
    """t_w: L exchanges of one round trip each plus the bytes over `num_ports` ports.

    A layer's request and reply cannot overlap, so both directions add up.
    """
    num_bytes = rows * shape.wire_bytes(num_nodes, partition)
    moving = num_bytes / (network.bytes_per_s * num_ports)
    return shape.num_layers * network.latency_us * 1e-6 + moving


def min_bandwidth(
    shape: ModelShape, rows: float, model_s: float, attention_s: float, alpha: float
) -> float:
    """Bytes/s that keep wire time within `alpha` of compute and attention time.

    Lamina section 3.3: (2 + 2/G) e d B L / (alpha (MTIME + ATIME)).
    """
    return rows * shape.wire_bytes() / (alpha * (model_s + attention_s))


def step_time(
    model_s: float, attention_s: float, wire_s: float, num_micro_batches: int = 1
) -> float:
    """Time between tokens with `num_micro_batches` staggered micro-batches.

    Lamina section 4.3: n batches rotate over max(n-1, 1) model replicas and share the
    memory nodes. The arguments are those of *one* micro-batch. A period is at least a
    micro-batch's own chain, and at least what each resource needs for all n.
    """
    replicas = max(num_micro_batches - 1, 1)
    return max(
        model_s + attention_s + wire_s,
        num_micro_batches * model_s / replicas,
        num_micro_batches * attention_s,
        num_micro_batches * wire_s,
    )


def max_batch(shape: ModelShape, kv_budget_bytes: float, context: float) -> int:
    """Requests of `context` tokens whose KV fits the budget."""
    return max(int(kv_budget_bytes // shape.kv_bytes(context)), 0)


def memory_budget(device: Device, count: float) -> float:
    """Usable bytes of `count` devices; a measured node's are its own KV budget."""
    share = 1.0 if device.attention_only else MEMORY_FRACTION
    return count * device.memory_gb * 1e9 * share


def prefill_time(
    shape: ModelShape,
    device: Device,
    tp: int,
    tokens: float,
    context: float | None = None,
) -> float:
    """Prefill of `tokens` prompt tokens: GEMMs plus causal attention.

    The output head sees one row of a prompt, in a step that decodes others.

    Args:
        context: Tokens that a prompt token attends to on average; by default half of
            `tokens`, one causal prompt. A window caps it.
    """
    seen = tokens / 2 if context is None else context
    attention_flops = tokens * shape.attention_flops(seen)
    peak = device.tflops * 1e12 * device.compute_efficiency
    return layers_time(shape, device, tp, tokens) + attention_flops / (peak * tp)


def usd_per_mtoken(usd_per_hour: float, tokens_per_s: float) -> float:
    """USD per 1e6 generated tokens."""
    return usd_per_hour / 3600 / tokens_per_s * 1e6
