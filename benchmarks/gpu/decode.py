# SPDX-License-Identifier: Apache-2.0
"""A step of ``gpu_suite.py``: decode rates beside stock's, and what a pool holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gpu import model as gpu_model
from gpu.engines import LOCAL_GIB, Engines, Variant

BATCHES = (1, 8, 32, 64, 128, 256)
LONG_POINT = {"batch": 24, "context": 8192, "steps": 8}


def timed_variants() -> list[Variant]:
    """Engines whose tokens per second are compared.

    Steps in two micro-batches run without CUDA graphs. The last engine starts its own
    node on the CPU.
    """
    points = tuple({"batch": b, "context": 512, "steps": 24} for b in BATCHES)
    few = points[2:5:2]
    return [
        Variant("v2", "piecewise", "", points=points),
        Variant("v2", "piecewise", "cpu", points=points),
        Variant("v2", "piecewise", "gpu", points=points),
        Variant("v1", "eager", "cpu", 1, few),
        Variant("v1", "eager", "cpu", 2, few),
        Variant("v2", "piecewise", "cpu", 2, few),
        Variant("v2", "piecewise", "local", 1, (LONG_POINT,)),
    ]


def measure_decode(
    device: torch.device, *, is_dry: bool, logs: Path | None
) -> dict[str, Any]:
    """Decode tokens/s beside stock, one engine at a time; parts; what pools hold.

    Raises:
        RuntimeError: An engine failed.
    """
    variants = timed_variants()
    planned = [variant.name for variant in variants]
    print("engines: " + ", ".join(planned))
    if is_dry:
        point = {"batch": 2, "context": 16, "steps": 5}
        variants = [Variant("v1", "eager", "local", 1, (point,))]
    with Engines(device, is_dry=is_dry, logs=logs) as started:
        results = started.run_in_turns(variants)
    _print_rates(results)
    failed = [name for name, result in results.items() if "error" in result]
    if failed:
        raise RuntimeError(f"engines failed: { ({n: results[n] for n in failed}) }")
    shape = gpu_model.DRY_SHAPE if is_dry else gpu_model.LLAMA_8B_SHAPE
    pool_gib = 0.02 if is_dry else LOCAL_GIB
    token_bytes = gpu_model.kv_bytes_per_token(shape, 4 if is_dry else 2)
    expected = pool_gib * 2**30 / token_bytes
    found = results[variants[-1].name]["capacity_tokens"]
    print(f"{found:,} tokens; {pool_gib:g} GiB of the host hold {expected:,.0f}")
    capacity = {
        "tokens": found,
        "expected_tokens": expected,
        "error": found / expected - 1,
    }
    return {"planned": planned, "engines": results, "capacity": capacity}


def _print_rates(results: dict[str, Any]) -> None:
    for name, result in results.items():
        for point in result.get("points", ()):
            rate, batch = point["tokens_per_s"], point["batch"]
            print(f"{name:<28}{batch:5} x {point['context']:5}{rate:12.1f} tokens/s")
        if "error" in result:
            print(f"{name}: {result['error'][-300:]}")
