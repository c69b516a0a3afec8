# SPDX-License-Identifier: Apache-2.0
"""Measure a machine and its memory nodes, and write a hardware TOML for `plan`."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.planner.calibrate.engine_probe import (
    BATCHES,
    QUICK_BATCHES,
    EngineProbe,
)
from vllm_attn_offload.planner.calibrate.node_probe import (
    GRID,
    QUICK_GRID,
    NodeProbe,
    model_geometry,
)
from vllm_attn_offload.planner.calibrate.node_session import TIMEOUT_S
from vllm_attn_offload.planner.calibrate.probes import (
    AttentionProbe,
    Entry,
    GemmProbe,
    MemoryProbe,
    Probe,
    ProbeResult,
)
from vllm_attn_offload.planner.calibrate.step_progress import StepProgress
from vllm_attn_offload.planner.hardware.device import Device
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.shape import ModelShape
from vllm_attn_offload.protocol.geometry import Dtype
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

HEADER = "# Written by vllm-attn-offload calibrate; running it again replaces it."
# Seconds per probe. With the start of vLLM all of them stay below two minutes.
BUDGETS_S = {MemoryProbe: 2.0, GemmProbe: 5.0, AttentionProbe: 4.0}
NODE_BUDGET_S, ENGINE_BUDGET_S = 10.0, 6.0
QUICK_SHARE = 0.1
# vLLM's default on a CPU; block sizes of GPUs are smaller, and matter less there.
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 128, 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """One run of `calibrate`.

    Args:
        name: Name of the device and the network; the node's is NAME-node.
        output: TOML file to write.
        device: Torch device of the compute side.
        dtype: Data type of weights, activations and KV.
        addresses: Running memory nodes of one engine.
        shape: Model whose sizes are measured; None: one with 1B parameters.
        engine_model: Model to time vLLM with; None: vLLM is not timed.
        cpus: CPUs of vLLM's worker; empty: its default.
        trust: ``auth_token_file``, ``tls_cert``, ``tls_key``, ``tls_ca``; all or none.
        is_quick: Fewer repetitions and points.
    """

    name: str
    output: Path
    device: str
    dtype: Dtype
    addresses: tuple[str, ...]
    shape: ModelShape | None = None
    engine_model: str | None = None
    cpus: str = ""
    trust: Mapping[str, str] = field(default_factory=dict)
    is_quick: bool = False

    def run(self) -> str:
        """Measure, write the file, and return what was found beyond it.

        Raises:
            ValueError: A device or model cannot be used, or the file is not ours.
            MemoryNodeError: A memory node cannot be used.
        """
        check_output(self.output)
        device = parse_device(self.device)
        for address in self.addresses:
            # Before a minute goes by with other things.
            ControlClient(address, TIMEOUT_S, self._credentials()).close()
        if self.cpus:
            torch.set_num_threads(len(self.cpus.split(",")))
        share = QUICK_SHARE if self.is_quick else 1.0
        results: list[ProbeResult] = []
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            probes = self._probes(device)
            num_steps = len(probes) + bool(self.engine_model)
            progress = stack.enter_context(StepProgress(num_steps))
            for probe in probes:
                progress.begin(probe.title)
                budget_s = BUDGETS_S.get(type(probe), NODE_BUDGET_S)
                results.append(probe.run(budget_s * share))
            if self.engine_model is not None:
                engine = self._engine_probe(results)
                progress.begin(engine.title)
                results.append(engine.run(ENGINE_BUDGET_S * share))
        write_hardware(self.output, self.name, results)
        return "\n".join(note for result in results for note in result.notes)

    def _probes(self, device: torch.device) -> list[Probe]:
        dtype = getattr(torch, self.dtype)
        matrices, heads = layer_sizes(self.shape)
        gemm = GemmProbe(device, dtype, matrices)
        num_layers = 16 if self.shape is None else self.shape.num_layers
        block_size = CPU_BLOCK_SIZE if device.type == "cpu" else GPU_BLOCK_SIZE
        node = NodeProbe(
            self.addresses,
            model_geometry(num_layers, *heads, self.dtype, block_size),
            gemm.layer_call,
            QUICK_GRID if self.is_quick else GRID,
            self._credentials(),
        )
        local = AttentionProbe(device, dtype, *heads)
        return [MemoryProbe(device), gemm, local, node]

    def _credentials(self) -> Credentials:
        if not self.trust:
            return NO_CREDENTIALS
        return Credentials(
            self.trust["auth_token_file"],
            self.trust["tls_cert"],
            self.trust["tls_key"],
            self.trust["tls_ca"],
        )

    def _engine_probe(self, results: Sequence[ProbeResult]) -> EngineProbe:
        assert self.engine_model is not None
        assert self.shape is not None
        device, node, network = merged(results).values()
        origin: dict[str, Any] = {"name": self.name, "source": "", "date": ""}
        points = cast(list[list[float]], device["gemm_curve"])
        curve = {"gemm_curve": tuple((rows, seconds) for rows, seconds in points)}
        return EngineProbe(
            self.engine_model,
            self.dtype,
            self.shape,
            self.addresses,
            Device(**origin | device | curve),
            Device(**origin | node),
            Network(**origin | network),
            self.cpus,
            self.trust,
            QUICK_BATCHES if self.is_quick else BATCHES,
        )


def layer_sizes(
    shape: ModelShape | None,
) -> tuple[tuple[tuple[int, int], ...], tuple[int, int, int]]:
    """(out, in) of a layer's matrices, and query heads, KV heads and head size."""
    if shape is None:
        matrices = ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632))
        return matrices, (16, 4, 128)
    layer = shape.layers[0]
    head_size = layer.q_elements // layer.num_heads
    return layer_matrices(shape), (layer.num_heads, layer.num_kv_heads, head_size)


def layer_matrices(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """(out, in) of one average layer: qkv, output, gate with up, and down projection.

    The feed-forward width follows from the parameters that attention leaves; the output
    head counts there, as it is read in the same way.
    """
    g, hidden = shape.layers[0], shape.hidden_size
    per_layer = (shape.dense_params + shape.expert_params) / shape.num_mixing_layers
    attention = hidden * (2 * g.q_elements + g.kv_elements)
    inner = max(round((per_layer - attention) / (3 * hidden)), 1)
    return (
        (g.q_elements + g.kv_elements, hidden),
        (hidden, g.q_elements),
        (2 * inner, hidden),
        (hidden, inner),
    )


def write_hardware(
    output: Path,
    name: str,
    results: Sequence[ProbeResult],
    description: str = platform.platform(),
) -> None:
    """Write [device.NAME], [device.NAME-node] and [network.NAME], as far as measured.

    Raises:
        ValueError: `output` is another program's file, or its folder does not exist.
    """
    check_output(output)
    source = f"measured by vllm-attn-offload calibrate on {description}"
    lines = [HEADER, *(f"# {note}" for r in results for note in r.notes)]
    for title, table in merged(results).items():
        if table:
            lines += ["", f"[{title.format(name)}]", *_toml_lines(table)]
            lines += [f'source = "{source}"', f'date = "{date.today()}"']
    output.write_text("\n".join(lines) + "\n", "utf-8")


def merged(results: Sequence[ProbeResult]) -> dict[str, dict[str, Entry]]:
    """Tables of device, node and network by title; later results replace earlier ones,
    as vLLM's own GEMM rates do those of torch."""
    device: dict[str, Entry] = {}
    node: dict[str, Entry] = {}
    network: dict[str, Entry] = {}
    for result in results:
        device |= result.device
        node |= result.node
        network |= result.network
    return {
        'device."{}"': device,
        'device."{}-node"': node,
        'network."{}"': network,
    }


def parse_device(text: str) -> torch.device:
    """`cpu` or `cuda:N`.

    Raises:
        ValueError: No such device here.
    """
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"Cannot use device {text!r}: {str(error).splitlines()[0]} Allowed: cpu, "
            "or cuda:N for a GPU that torch sees. Choose one of these."
        ) from error
    return device


def _toml_lines(entries: Mapping[str, Entry]) -> list[str]:
    lines = []
    for key, value in entries.items():
        if isinstance(value, bool):
            lines.append(f"{key} = {str(value).lower()}")
        elif isinstance(value, list):
            points = ", ".join(f"[{x:g}, {y:.6g}]" for x, y in value)
            lines.append(f"{key} = [{points}]")
        else:
            lines.append(f"{key} = {value:.6g}")
    return lines


def check_output(output: Path) -> None:
    """Refuse a file that calibrate did not write, before anything is measured.

    Raises:
        ValueError: Another program's file, or no such folder.
    """
    if output.exists() and HEADER not in output.read_text("utf-8").splitlines()[:1]:
        raise ValueError(
            f"{output} exists and was not written by calibrate. It is not overwritten. "
            "Give another --output, or remove the file."
        )
    if not output.absolute().parent.is_dir():
        raise ValueError(
            f"{output} cannot be written: its folder does not exist. --output names a "
            "file in an existing folder. Create the folder or give another path."
        )
