# SPDX-License-Identifier: Apache-2.0
"""Measure a machine and write a hardware TOML for `plan`."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_attn_offload.planner.model_shape import ModelShape
from vllm_attn_offload.planner.probes import (
    AttentionProbe,
    Entry,
    GemmProbe,
    MemoryProbe,
    Probe,
)

HEADER = "# Written by vllm-attn-offload calibrate; running it again replaces it."
# Seconds per probe: three local ones and one per memory node stay below two minutes.
BUDGET_S, QUICK_BUDGET_S = 15.0, 1.0
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def local_probes(
    device: torch.device, dtype: torch.dtype, shape: ModelShape | None = None
) -> list[Probe]:
    """Memory, GEMM and attention probes in the sizes of `shape`, or of a 1B model."""
    if shape is None:
        matrices: tuple[tuple[int, int], ...] = (
            (2560, 2048),
            (2048, 2048),
            (11264, 2048),
            (2048, 5632),
        )
        attention = AttentionProbe(device, dtype)
    else:
        matrices = layer_matrices(shape)
        group = shape.groups[0]
        head_size = group.q_elements // group.num_heads
        heads = group.num_heads, group.num_kv_heads
        attention = AttentionProbe(device, dtype, *heads, head_size)
    return [MemoryProbe(device), GemmProbe(device, dtype, matrices), attention]


def layer_matrices(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """(out, in) of one average layer: qkv, output, gate with up, and down projection.

    The feed-forward width follows from the parameters that attention leaves; the output
    head counts there, as it is read in the same way.
    """
    g, hidden = shape.groups[0], shape.hidden_size
    per_layer = (shape.dense_params + shape.expert_params) / shape.num_layers
    attention = hidden * (2 * g.q_elements + g.kv_elements)
    inner = max(round((per_layer - attention) / (3 * hidden)), 1)
    return (
        (g.q_elements + g.kv_elements, hidden),
        (hidden, g.q_elements),
        (2 * inner, hidden),
        (hidden, inner),
    )


def calibrate(
    name: str,
    output: Path,
    probes: Sequence[Probe],
    quick: bool = False,
    description: str = platform.platform(),
) -> None:
    """Run `probes` and write [device.`name`], and [network.`name`] if one measured it.

    Raises:
        ValueError: `output` is someone else's file, or its folder does not exist.
    """
    _check_output(output)
    device: dict[str, Entry] = {}
    network: dict[str, Entry] = {}
    with tqdm(probes, unit="probe") as bar:
        for probe in bar:
            bar.set_description(probe.title)
            result = probe.run(QUICK_BUDGET_S if quick else BUDGET_S)
            device |= result.device
            network |= result.network
    tables = {f'device."{name}"': device, f'network."{name}"': network}
    source = f"measured by vllm-attn-offload calibrate on {description}"
    lines = [HEADER]
    for title, entries in tables.items():
        if entries:
            lines += ["", f"[{title}]", *_toml_lines(entries)]
            lines += [f'source = "{source}"', f'date = "{date.today()}"']
    output.write_text("\n".join(lines) + "\n", "utf-8")


def parse_device(text: str) -> torch.device:
    """`cpu` or `cuda:N`.

    Raises:
        ValueError: no such device here.
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
        if isinstance(value, list):
            points = ", ".join(f"[{x:g}, {y:.6g}]" for x, y in value)
            lines.append(f"{key} = [{points}]")
        else:
            lines.append(f"{key} = {value:.6g}")
    return lines


def _check_output(output: Path) -> None:
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
