# SPDX-License-Identifier: Apache-2.0
"""The pictures of ``serving.py``; ``serving_plots.py JSON DIR`` draws them again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm_attn_offload.planner.plot import new_figure

Rows = list[dict[str, Any]]


def plot(rows: Rows, directory: Path) -> list[Path]:
    """Draw throughput over time between tokens, batch and KV use over time.

    Returns:
        The PNG files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return [
        _throughput(rows, directory / "serving-throughput.png"),
        *(
            _over_time(rows, rate, directory / f"serving-rate-{rate:g}.png")
            for rate in sorted({row["rate"] for row in rows})
        ),
    ]


def _throughput(rows: Rows, path: Path) -> Path:
    figure, axes = new_figure(2, "Throughput over time between tokens, one dot a rate")
    for axis, percentile in zip(axes, ("p50", "p99"), strict=True):
        for engine in dict.fromkeys(row["engine"] for row in rows):
            own = [row for row in rows if row["engine"] == engine]
            x = [row[f"{percentile}_itl_ms"] for row in own]
            axis.plot(x, [row["output_throughput"] for row in own], "o-", label=engine)
        axis.set(xlabel=f"TBT {percentile}, ms", ylabel="tokens/s", xlim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=120)
    return path


def _over_time(rows: Rows, rate: float, path: Path) -> Path:
    figure, (batch, kv_use) = new_figure(2, f"{rate:g} requests/s")
    for row in rows:
        if row["rate"] == rate:
            seconds = [sample["at_s"] for sample in row["samples"]]
            running = [sample["running"] for sample in row["samples"]]
            used = [100 * sample["kv_use"] for sample in row["samples"]]
            batch.plot(seconds, running, label=row["engine"])
            kv_use.plot(seconds, used, label=row["engine"])
    batch.set(xlabel="s", ylabel="running requests")
    kv_use.set(xlabel="s", ylabel="KV blocks in use, %")
    batch.legend()
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    saved = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    print("\n".join(map(str, plot(saved["rows"], Path(sys.argv[2])))))
