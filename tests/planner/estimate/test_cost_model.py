# SPDX-License-Identifier: Apache-2.0
"""The closed forms against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.hardware.catalogue import Catalogue
from vllm_attn_offload.planner.hardware.device import Device
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.shape import ModelShape, gqa_layers, mla_layers

# 2 layers, 8 query heads and 2 KV heads of 64: q 512, k + v 256, out 512 elements.
SHAPE = ModelShape("toy", 512, (gqa_layers(2, 8, 2, 64),), 1e9, 2e9)
DEVICE = Device(
    "toy", tflops=100, memory_gb=10, memory_gbps=1000, source="", date=""
).ideal()


def test_linear_time_roofline() -> None:
    # 1e9 parameters: 2 GB at 1 TB/s is 2 ms; 1000 rows are 2e12 flops, 20 ms.
    assert cost.model_time(SHAPE, DEVICE, 1, 1) == pytest.approx(2e-3, rel=1e-4)
    assert cost.model_time(SHAPE, DEVICE, 1, 1000) == pytest.approx(20e-3)


def test_micro_batches_share_the_output_head() -> None:
    """A fifth of the weights is read once per step, not per micro-batch."""
    shape = replace(SHAPE, lm_head_params=2e8, lm_head_bytes=4e8)
    device = replace(DEVICE, step_overhead_us=100, row_overhead_us=10)
    layers_s = cost.layers_time(shape, device, 1, 1)
    overhead_s = cost.overhead_time(shape, device, 1, 2)
    assert layers_s == pytest.approx(1.6e-3, rel=1e-4)
    assert overhead_s == pytest.approx(0.4e-3 + 120e-6)
    whole_s = cost.model_time(shape, DEVICE, 1, 2)
    assert whole_s == pytest.approx(cost.model_time(SHAPE, DEVICE, 1, 2))


def test_gemm_curve_replaces_the_roofline() -> None:
    curve = ((1.0, 0.010), (4.0, 0.016), (8.0, 0.020))
    assert cost.interpolate(curve, 0.5) == 0.010
    assert cost.interpolate(curve, 2.0) == pytest.approx(0.012)
    # Twice the last point's rows take twice its time.
    assert cost.interpolate(curve, 16.0) == pytest.approx(0.040)


def test_attention_time_bytes_and_flops() -> None:
    # 10 requests x 1000 tokens x 2 layers x 256 elements x 2 bytes = 10.24 MB.
    assert cost.attention_time(SHAPE, DEVICE, 1, 10, 1000) == pytest.approx(10.24e-6)
    assert cost.attention_time(SHAPE, DEVICE, 2, 10, 1000) == pytest.approx(5.12e-6)
    # MLA with 128 heads does 2 x 128 x (576 + 512) flops on 576 x 2 bytes: 241.8 a
    # byte, above this device's 100.
    mla = ModelShape("mla", 512, (mla_layers(1, 128, 512, 64),), 1e9, 2e9)
    flops = 10 * 1000 * 2 * 128 * (576 + 512)
    assert cost.attention_time(mla, DEVICE, 1, 10, 1000) == pytest.approx(flops / 1e14)


def test_wire_bytes_by_partition() -> None:
    one = SHAPE.wire_bytes()
    assert one == 2 * (512 + 256 + 512) * 2
    assert SHAPE.wire_bytes(4, "heads") == one
    # Four nodes get q and answer out and 8 fp32 log-sum-exps; one stores k and v.
    assert SHAPE.wire_bytes(4, "blocks") == 2 * (4 * (1024 + 1024 + 32) + 512)


def test_wire_bytes_is_the_papers_formula(shapes: dict[str, ModelShape]) -> None:
    # (2 + 2/G) e d L with G = 8, d = 8192, L = 80, e = 2.
    assert (
        shapes["llama-3-70b"].wire_bytes() == (2 + 2 / 8) * 2 * 8192 * 80 == 2_949_120
    )


def test_wire_time() -> None:
    network = Network("n", gbps=8, latency_us=100, efficiency=1.0)
    # 2 layers x 100 us, and 1000 x 5120 bytes over two ports of 1 GB/s.
    expected = 200e-6 + 5.12e6 / 2e9
    assert cost.wire_time(SHAPE, network, 1000, 2, 2) == pytest.approx(expected)


def test_allreduce_time() -> None:
    device = Device("d", 1, 1, 1, "", "", link_gbps=100, link_latency_us=10)
    # 2 layers x 2 all-reduces of 1000 x 512 x 2 bytes, 1.5 of it per link, 6 hops.
    expected = 4 * (1.5 * 1_024_000 / 100e9 + 60e-6)
    assert cost.allreduce_time(SHAPE, device, 4, 1000) == pytest.approx(expected)
    assert cost.allreduce_time(SHAPE, device, 1, 1000) == 0


@pytest.mark.parametrize(
    ("n", "times", "expected"),
    [
        (1, (10, 6, 2), 18),  # serial
        (2, (10, 6, 2), 20),  # the model's two turns bound it
        (2, (6, 10, 2), 20),  # the memory nodes' two turns
        (2, (5, 5, 4), 14),  # a micro-batch's own chain
        (3, (10, 5, 0), 15),  # two replicas: perfect rotation
    ],
)
def test_step_time(n: int, times: tuple[float, float, float], expected: float) -> None:
    assert cost.step_time(*times, n) == expected


def test_prefill_time() -> None:
    # 1000 tokens: 2e12 flops (20 ms), and 1000 x 500 pairs x 2 layers x 2048 flops.
    expected = 20e-3 + 1000 * 500 * 2 * 2 * 8 * 128 / 1e14
    assert cost.prefill_time(SHAPE, DEVICE, 1, 1000) == pytest.approx(expected)


def test_max_batch(catalogue: Catalogue, shapes: dict[str, ModelShape]) -> None:
    # Lamina section 3.2: an H100's memory holds about 30 requests at 8192 tokens.
    h100 = catalogue.device("H100")
    shape = shapes["llama-3-70b"]
    assert cost.max_batch(shape, h100.memory_gb * 1e9, 8192) == 29
    assert cost.memory_budget(h100, 2) == pytest.approx(144e9)


def test_usd_per_mtoken() -> None:
    assert cost.usd_per_mtoken(3.6, 1000) == pytest.approx(1.0)
