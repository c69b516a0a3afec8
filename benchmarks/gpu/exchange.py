# SPDX-License-Identifier: Apache-2.0
"""A step of ``gpu_suite.py``: one layer's exchange by part, beside its bounds.

The classes are those of the worker; only the engine around them is missing. A
session's layer is attended again and again, so the node reads the same tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from gpu.system import memory_node, missing

if TYPE_CHECKING:
    from gpu.layer import OneLayer

#: Requests and tokens of each: a decode step of one, and of larger batches.
POINTS = ((1, 512), (8, 512), (32, 2048), (128, 2048), (256, 512))
DRY_POINTS = ((2, 40),)
#: Beyond copies and attention, in microseconds. The same GPU serves twice: with rows
#: through the host, and in memory that both processes map.
BARS_US = {"cpu": 40.0, "gpu": 40.0, "shared": 15.0}


def measure_exchange(device: torch.device, *, is_dry: bool) -> dict[str, Any]:
    """Per layer and point: the whole, its parts, and what is left over."""
    reason = missing(("vllm", "msgspec", "psutil", "prometheus_client"))
    if reason:
        print(f"skipped: {reason}")
        return {"skipped": reason}
    # Late: it needs the packages above.
    from gpu.layer import OneLayer

    rows = []
    print(f"{'node':<8}{'batch':>6}{'context':>9}{'layer us':>12}{'overhead us':>14}")
    with tempfile.TemporaryDirectory(prefix="attn-offload-exchange-") as work:
        for name in BARS_US:
            where = torch.device("cpu") if name == "cpu" else device
            gib = 0.1 if is_dry else 8.0
            with memory_node(work, where, kv_cache_gib=gib, name=name) as address:
                for point in DRY_POINTS if is_dry else POINTS:
                    shares = device.type == "cuda" and name == "shared"
                    with closing(
                        OneLayer(address, device, point, shares=shares, is_dry=is_dry)
                    ) as layer:
                        row = _measure(layer, is_dry=is_dry)
                    rows.append({"node": name, "bar_us": BARS_US[name], **row})
                    print(
                        f"{name:<8}{row['batch']:6}{row['context']:9}"
                        f"{row['layer_us'][0]:12.1f}{row['overhead_us']:14.1f}",
                        flush=True,
                    )
    return {"rows": rows}


def _measure(layer: OneLayer, *, is_dry: bool) -> dict[str, Any]:
    repeats = 3 if is_dry else 60
    for _ in range(3):
        layer.attend()
    before = layer.session.node_times()
    times = _times_us(layer.attend, repeats)
    after = layer.session.node_times()
    parts = {
        f"node_{part}_us": 1e6 * (after[part] - before[part]) / repeats
        for part in before
    }
    parts |= _copies(layer.rows, layer.output, repeats, is_shared=layer.is_shared)
    known = parts["node_attend_us"] + parts["copy_out_us"] + parts["copy_back_us"]
    return {
        "batch": layer.batch,
        "context": layer.context,
        "transport": layer.session.transport,
        "layer_us": times,
        "parts_us": parts,
        "bytes_out": layer.rows.nbytes,
        "bytes_back": layer.output.nbytes,
        "overhead_us": times[0] - known,
    }


def _copies(
    rows: torch.Tensor, output: torch.Tensor, repeats: int, *, is_shared: bool
) -> dict[str, float]:
    """Time copies of the same bytes alone, over the link or within the device."""
    on_gpu = rows.is_cuda
    found = {}
    for name, tensor in (("copy_out_us", rows), ("copy_back_us", output)):
        there = (
            torch.empty_like(tensor)
            if is_shared
            else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        )
        target, source = (there, tensor) if name == "copy_out_us" else (tensor, there)

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            target.copy_(source, non_blocking=True)
            if on_gpu:
                torch.cuda.current_stream().synchronize()

        found[name] = _times_us(copy, repeats)[0]
    return found


def _times_us(call: Callable[[], None], repeats: int) -> list[float]:
    """Median, p20 and p80."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - started))
    times.sort()
    return [statistics.median(times), times[repeats // 5], times[4 * repeats // 5]]
