# SPDX-License-Identifier: Apache-2.0
"""Calibration writes a hardware file that plan reads; the fits find known values."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_attn_offload.commands import main
from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess
from vllm_attn_offload.planner.calibrate import time_engine
from vllm_attn_offload.planner.calibrate.calibration import (
    layer_matrices,
    write_hardware,
)
from vllm_attn_offload.planner.calibrate.engine_probe import (
    CHILD,
    EngineProbe,
    EngineTime,
)
from vllm_attn_offload.planner.calibrate.node_probe import (
    NodeProbe,
    fit_nonnegative,
    model_geometry,
)
from vllm_attn_offload.planner.calibrate.probes import (
    AttentionProbe,
    GemmProbe,
    MemoryProbe,
    fit_line,
)
from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.hardware.catalogue import load_catalogue
from vllm_attn_offload.planner.hardware.device import Device
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.shape import ModelShape, StateShape, gqa_layers

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[1] / "configs"


def test_fit_line() -> None:
    sizes = [1e3, 1e5, 1e7]
    fixed_s, bandwidth = fit_line(sizes, [2e-5 + size / 1e10 for size in sizes])
    assert fixed_s == pytest.approx(2e-5)
    assert bandwidth == pytest.approx(1e10)
    # Noise that would make the fixed part or the slope negative.
    assert fit_line([1.0, 2.0], [1.0, 3.0])[0] == 0
    assert fit_line([1.0, 2.0], [2.0, 1.0]) == (1.0, 2.0)


def test_fit_nonnegative() -> None:
    rows, sizes = [1.0, 4.0, 16.0, 1.0], [1e4, 1e5, 1e4, 1e6]
    seconds = [3e-5 + 2e-6 * r + s / 1e10 for r, s in zip(rows, sizes, strict=True)]
    found = fit_nonnegative([[1.0] * 4, rows, sizes], seconds)
    assert found == pytest.approx([3e-5, 2e-6, 1e-10])
    # A falling line: the slope becomes 0, not negative.
    assert fit_nonnegative([[1.0, 1.0], [1.0, 2.0]], [2.0, 1.0])[1] == 0


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    """Two running memory nodes; sockets need short paths."""
    with tempfile.TemporaryDirectory(prefix="cal-") as folder:
        nodes = [
            MemoryNodeProcess(
                Path(folder, str(index)),
                kv_cache_gib=0.25,
                cpus="",
                startup_timeout_s=60,
            )
            for index in range(2)
        ]
        yield [node.address for node in nodes]
        for node in nodes:
            node.stop()


@pytest.mark.parametrize(
    ("num_nodes", "num_kv_heads"),
    [(1, 2), (2, 2), (2, 1)],
    ids=["1", "heads", "blocks"],
)
def test_node_probe(addresses: list[str], num_nodes: int, num_kv_heads: int) -> None:
    """Real nodes, through the engine's own client, in every partition."""
    geometry = model_geometry(2, 4, num_kv_heads, 32, "float32", 16)
    calls = []
    probe = NodeProbe(
        addresses[:num_nodes],
        geometry,
        lambda rows: lambda: calls.append(rows),
        grid=((1, 16), (4, 100), (8, 200)),
    )
    result = probe.run(0.1)
    assert {1, 4, 8} == set(calls)
    assert result.node["attention_only"] is True
    assert result.node["memory_gb"] == pytest.approx(0.25 * (1 << 30) / 1e9)
    assert all(t.exchange_s >= t.attend_s > 0 for _, _, t in probe.points)
    assert result.network["latency_us"] >= 0
    assert result.network["gbps"] > 0


def test_node_probe_needs_room(addresses: list[str]) -> None:
    geometry = model_geometry(32, 32, 32, 128, "float32", 16)
    probe = NodeProbe(addresses[:1], geometry, lambda rows: lambda: None)
    with pytest.raises(ValueError, match="larger --kv-cache-gib"):
        probe.run(0.1)


@pytest.mark.parametrize("states", [None, StateShape(30, 0, 1e5)])
def test_engine_probe_splits_a_step(states: StateShape | None) -> None:
    """Overheads and rates that were put in come out, and give the same step again."""
    layers, head = 0.9e9, 0.1e9
    shape = ModelShape("m", 64, (gqa_layers(10, 4, 2, 16),), 5e8, 1e9, head / 2, head)
    shape = replace(shape, states=states)
    gemm = ((1.0, 0.05), (8.0, 0.06), (32.0, 0.1), (64.0, 0.3))
    torch_alone = Device("d", 1, 1, 1, "", "", gemm_curve=gemm)
    rate = {1: 0.05, 8: 0.06, 32: 0.10}

    def time(b: int) -> EngineTime:
        compute = layers / 1e9 * rate[b] + shape.num_mixing_layers * 200e-6
        compute += cost.state_time(shape, torch_alone, 1, b)
        outside = head / 1e9 * rate[b] + 4e-3 + b * 50e-6
        # 10 layers: 500 us and 100 ns per row and token each, and 20 kB per row.
        exchange = 10 * (500e-6 + b * 60 * 100e-9 + b * 20e3 / 1e9)
        layers_s = compute + exchange
        return EngineTime(layers_s + outside, layers_s, exchange, context=60)

    kv, wire = shape.kv_bytes_per_token / 10, shape.wire_bytes() / 10
    node = Device("n", 1, 1, 1, "", "", attention_gbps=kv / 100)
    network = Network("w", wire / 20e3 * 8, latency_us=0, efficiency=1)
    probe = EngineProbe("m", "bfloat16", shape, ["a"], torch_alone, node, network, "")
    times = [(b, time(b)) for b in rate]
    assert probe.latency_us(times) == pytest.approx(500)
    found = probe.split(times)
    assert found["layer_overhead_us"] == pytest.approx(200)
    assert found["step_overhead_us"] == pytest.approx(4000)
    assert found["row_overhead_us"] == pytest.approx(50)
    # Beyond the engine's batches torch's curve goes on.
    assert found["gemm_curve"][-1] == pytest.approx([64.0, 0.3])  # type: ignore[index]
    curve = tuple((r, s) for r, s in found.pop("gemm_curve"))  # type: ignore[union-attr]
    device = Device("d", 1, 1, 1, "", "", gemm_curve=curve, **found)  # type: ignore[arg-type]
    for b in rate:
        step_s = cost.model_time(shape, device, 1, b)
        assert step_s + time(b).exchange_s == pytest.approx(time(b).step_s, rel=1e-4)


def test_engine_probe_names_its_child() -> None:
    """Two strings that vLLM and Python resolve in other processes."""
    module, _, name = time_engine.EXTENSION.rpartition(".")
    assert getattr(importlib.import_module(module), name) is time_engine.LayerTimer
    assert time_engine.__name__ == CHILD


def test_engine_probe_survives_noise() -> None:
    """A larger batch that was faster must not give a negative rate."""
    shape = ModelShape("m", 64, (gqa_layers(10, 4, 2, 16),), 5e8, 1e9)
    node, network = Device("n", 1, 1, 1, "", ""), Network("w", 1)
    torch_alone = Device("d", 1, 1, 1, "", "", gemm_curve=((1, 0.001), (8, 0.001)))
    probe = EngineProbe("m", "bfloat16", shape, ["a"], torch_alone, node, network, "")
    times = [(1, EngineTime(0.5, 0.6, 0.1, 60)), (8, EngineTime(0.3, 0.2, 0.3, 60))]
    found = probe.split(times)
    assert all(s > 0 for _, s in found["gemm_curve"])  # type: ignore[union-attr]


def test_calibrate_then_plan_without_prices(
    tmp_path: Path, addresses: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What calibrate writes is enough for plan; a price is an option."""
    path = tmp_path / "here.toml"
    results = [
        MemoryProbe(CPU).run(0.01),
        GemmProbe(CPU, torch.float32, ((64, 64),), rows=(1, 4)).run(0.01),
        AttentionProbe(CPU, torch.float32, 2, 1, 32).run(0.01),
        NodeProbe(
            addresses[:1],
            model_geometry(2, 4, 2, 32, "float32", 16),
            lambda rows: lambda: None,
            grid=((1, 16), (2, 64), (4, 32)),
        ).run(0.1),
    ]
    write_hardware(path, "here", results)
    device = load_catalogue([path]).device("here")
    assert [rows for rows, _ in device.gemm_curve] == [1, 4]
    model = str(CONFIGS / "llama-3-8b")
    arguments = ["plan", model, "--compute", "here", "--memory", "2xhere-node"]
    arguments += ["--network", "here", "--hardware", str(path), "--context", "64"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "no price" in out
    hint = "--price here=USD_PER_HOUR --price here-node=USD_PER_HOUR"
    assert hint in " ".join(out.split())
    assert main([*arguments, "--price", "here=1", "--price", "here-node=0.5"]) == 0
    out = capsys.readouterr().out
    assert "no price" not in out
    # A memory node that was measured as one is no homogeneous alternative.
    assert "xhere-node" not in out.splitlines()[3].replace("+ 2xhere-node", "")
    swapped = ["--compute", "here-node", "--memory", "here"]
    assert main([*arguments[:2], *swapped, "--hardware", str(path)]) == 2
    assert "Swap --compute and --memory" in capsys.readouterr().err


def test_calibrate_command(
    tmp_path: Path, addresses: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, without vLLM, and it gives the CPUs back."""
    path = tmp_path / "hardware.toml"
    allowed = os.sched_getaffinity(0)
    arguments = ["calibrate", "--output", str(path), "--quick", "--no-engine"]
    arguments += ["--memory-node", addresses[0], "--cpus", str(min(allowed))]
    assert main([*arguments, "--model", str(small_model(tmp_path))]) == 0
    assert os.sched_getaffinity(0) == allowed
    said = capsys.readouterr()
    assert "--memory 1xlocal-node --network local" in said.out
    steps = said.err.splitlines()
    assert [line[:22] for line in steps] == [
        f"calibrate: step {step} of 4" for step in range(1, 5)
    ]
    assert "after 0 s: memory" in steps[0]
    catalogue = load_catalogue([path])
    assert catalogue.device("local-node").attention_only
    assert catalogue.networks["local"].latency_us >= 0


@pytest.mark.slow
def test_calibrate_times_the_engine(tmp_path: Path) -> None:
    """vLLM itself, on a memory node that calibrate starts."""
    path = tmp_path / "hardware.toml"
    model = str(small_model(tmp_path))
    arguments = ["calibrate", "--output", str(path), "--quick", "--model", model]
    assert main([*arguments, "--dtype", "float32"]) == 0
    device = load_catalogue([path]).device("local")
    assert device.step_overhead_us > 0
    assert [rows for rows, _ in device.gemm_curve][:3] == [1, 8, 32]
    assert "# engine, eager" in path.read_text("utf-8")


def small_model(folder: Path) -> Path:
    """A model directory of few and small layers, without weights."""
    (folder / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama",'
        ' "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,'
        ' "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,'
        ' "max_position_embeddings": 2048}'
    )
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "Cannot use device 'cuda:99'"),
        (["--memory-node", "127.0.0.1:9"], "cannot connect"),
        (["--output", "/no/such/folder/x.toml"], "its folder does not exist"),
    ],
)
def test_calibrate_errors(
    tmp_path: Path,
    addresses: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    defaults = ["--output", str(tmp_path / "x.toml"), "--quick"]
    if "--memory-node" not in arguments:
        defaults += ["--memory-node", addresses[0]]
    assert main(["calibrate", *defaults, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_calibrate_keeps_other_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[device.mine]\n")
    with pytest.raises(ValueError, match="not overwritten"):
        write_hardware(path, "x", [])


def test_layer_matrices_hold_the_parameters(shapes: dict[str, ModelShape]) -> None:
    shape = shapes["llama-3-8b"]
    held = sum(n * k for n, k in layer_matrices(shape)) * shape.num_layers
    assert held == pytest.approx(shape.dense_params, rel=1e-3)
