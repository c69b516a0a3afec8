# SPDX-License-Identifier: Apache-2.0
"""A step of ``gpu_suite.py``: tokens of all kinds of engines beside stock's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gpu.engines import Engines, Variant

#: Answers may part where the best two choices were one step of bf16 apart, which is
#: 2^-4 for logits from 8 to 16.
MAX_TIE = 0.07
_PARALLEL_ENGINES = 6

EQUALITY = [
    Variant(runner, mode, node)
    for runner in ("v1", "v2")
    for mode in ("eager", "piecewise")
    for node in ("", "cpu", "gpu")
]


def compare_tokens(
    device: torch.device, *, is_dry: bool, logs: Path | None
) -> dict[str, Any]:
    """Greedy tokens of all variants beside those of the same one without offload.

    Raises:
        RuntimeError: An engine failed, tokens differ where there was no tie, rows
            passed the host without need, or the device was synchronised.
    """
    planned = [variant.name for variant in EQUALITY]
    print("engines: " + ", ".join(planned))
    variants = [EQUALITY[0], EQUALITY[1]] if is_dry else EQUALITY
    with Engines(device, is_dry=is_dry, logs=logs) as started:
        results = started.run(variants, 1 if is_dry else _PARALLEL_ENGINES)
    rows, problems = [], []
    for variant in variants:
        found = results[variant.name]
        if "error" in found:
            problems.append(f"{variant.name}: {found['error'][-400:]}")
        elif variant.node:
            stock = results[Variant(variant.runner, variant.mode).name]
            row = {"variant": variant.name, **compare(stock, found)}
            rows.append(row)
            print(row)
            problems += [f"{variant.name}: {text}" for text in row["differences"]]
            if found["shares_gpu_memory"] != (variant.node == "gpu" and not is_dry):
                problems.append(f"{variant.name}: rows pass where they should not")
            problems += found["synchronisations"][:1]
    if problems:
        raise RuntimeError("; ".join(problems))
    return {"planned": planned, "rows": rows, "engines": results}


def compare(stock: dict[str, Any], offload: dict[str, Any]) -> dict[str, Any]:
    """Answers that are identical, and where the others part."""
    identical, ties, differences = 0, [], []
    for index, (ours, theirs) in enumerate(
        zip(offload["tokens"], stock.get("tokens", []), strict=False)
    ):
        pairs = zip(ours["tokens"], theirs["tokens"], strict=True)
        parted = [at for at, (mine, other) in enumerate(pairs) if mine != other]
        if not parted:
            identical += 1
        elif theirs["leads"][parted[0]] < MAX_TIE:
            ties.append([index, parted[0], theirs["leads"][parted[0]]])
        else:
            lead = theirs["leads"][parted[0]]
            differences.append(f"answer {index} parts at {parted[0]}, lead {lead:.3g}")
    if "tokens" not in stock:
        differences.append("there is no stock answer")
    return {"identical": identical, "ties": ties, "differences": differences}
