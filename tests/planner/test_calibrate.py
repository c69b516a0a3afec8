# SPDX-License-Identifier: Apache-2.0
"""Calibration writes a hardware file that plan reads; the fits find known values."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from vllm_attn_offload.planner.calibrate import calibrate, layer_matrices
from vllm_attn_offload.planner.cli import main
from vllm_attn_offload.planner.hardware import load_catalogue
from vllm_attn_offload.planner.model_shape import ModelShape
from vllm_attn_offload.planner.probes import (
    AttentionProbe,
    ExchangeProbe,
    GemmProbe,
    MemoryProbe,
    Probe,
    fit_line,
)

CPU = torch.device("cpu")


def test_fit_line() -> None:
    sizes = [1e3, 1e5, 1e7]
    fixed_s, bandwidth = fit_line(sizes, [2e-5 + size / 1e10 for size in sizes])
    assert fixed_s == pytest.approx(2e-5)
    assert bandwidth == pytest.approx(1e10)
    # Noise that would make the fixed part or the slope negative.
    assert fit_line([1.0, 2.0], [1.0, 3.0])[0] == 0
    assert fit_line([1.0, 2.0], [2.0, 1.0]) == (1.0, 2.0)


def test_exchange_probe() -> None:
    def exchange(sent: int, received: int) -> None:
        end = time.perf_counter() + 2e-4 + (sent + received) / 1e9
        while time.perf_counter() < end:
            pass

    found = ExchangeProbe(exchange).run(0.2).network
    assert found["latency_us"] == pytest.approx(200, rel=0.3)
    assert found["gbps"] == pytest.approx(8, rel=0.3)


def test_calibrate_then_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probes: list[Probe] = [
        MemoryProbe(CPU),
        GemmProbe(CPU, torch.float32, ((64, 64),), rows=(1, 4)),
        AttentionProbe(CPU, torch.float32, num_heads=2, num_kv_heads=1, head_size=32),
        ExchangeProbe(lambda sent, received: time.sleep(1e-4)),
    ]
    path = tmp_path / "here.toml"
    for probe in probes:
        probe_run = probe.run(0.01)
        assert probe_run.device or probe_run.network
    calibrate("here", path, probes, quick=True)
    catalogue = load_catalogue([path])
    device = catalogue.device("here")
    assert [rows for rows, _ in device.gemm_curve] == [1, 4]
    assert device.attention_gbps is not None
    assert catalogue.networks["here"].latency_us > 0
    model = Path(__file__).with_name("configs") / "llama-3-8b"
    arguments = ["--compute", "here", "--memory", "here", "--network", "here"]
    arguments += ["--hardware", str(path), "--price", "here=1"]
    assert main(["plan", str(model), *arguments]) == 0
    assert "Verdict: " in capsys.readouterr().out


def test_calibrate_keeps_other_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[device.mine]\n")
    with pytest.raises(ValueError, match="not overwritten"):
        calibrate("x", path, [])


def test_calibrate_bad_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "x.toml")
    assert main(["calibrate", "--device", "cuda:99", "--output", output]) == 2
    assert "Cannot use device 'cuda:99'" in capsys.readouterr().err


def test_layer_matrices_hold_the_parameters(shapes: dict[str, ModelShape]) -> None:
    shape = shapes["llama-3-8b"]
    held = sum(n * k for n, k in layer_matrices(shape)) * shape.num_layers
    assert held == pytest.approx(shape.dense_params, rel=1e-3)
