# SPDX-License-Identifier: Apache-2.0
"""Draws the committed decode measurements: time per step over context, by batch.

``python benchmarks/plot_results.py`` reads ``benchmarks/results/microbatches-*.json``,
which ``offline.py`` wrote, and writes ``docs/decode_step.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_attn_offload.planner.plot import new_figure

ROOT = Path(__file__).resolve().parents[1]
TITLE = "Time per decode step on the same two CPU cores (lower is better)"
MODEL = "SmolLM2-135M, fp32, eager"
#: Columns of `offline.py`: label and line style. Colours are safe for the colour-blind.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "stock, CPUs 0-1": ("stock vLLM, 2 cores", {"color": "#4d4d4d", "marker": "s"}),
    "offload 1": (
        "offload, 1 micro-batch (1 core + 1 core)",
        {"color": "#56b4e9", "marker": "o", "linestyle": "--"},
    ),
    "offload 2": (
        "offload, 2 micro-batches (1 core + 1 core)",
        {"color": "#d55e00", "marker": "o"},
    ),
}
STOCK, BEST = "stock, CPUs 0-1", "offload 2"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    results = sorted((ROOT / "benchmarks" / "results").glob("microbatches-*.json"))
    parser.add_argument("files", nargs="*", type=Path, default=results, metavar="JSON")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "decode_step.png", metavar="PNG"
    )
    return parser.parse_args()


def main() -> None:
    """Read, draw, write."""
    arguments = parse_arguments()
    reports = [json.loads(path.read_text("utf-8")) for path in arguments.files]
    rows = [row for report in reports for row in report["rows"]]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, describe(reports), arguments.output)
    print(f"wrote {arguments.output}")


def describe(reports: list[dict[str, Any]]) -> str:
    """The caption: the model, the machines of all reports, and how it was measured."""
    machines = {
        f"{about['cpu']}, {about['cores']} cores, {' '.join(about['instructions'])}"
        for about in (report["environment"] for report in reports)
    }
    num_runs = {
        len(times)
        for report in reports
        for row in report["rows"]
        for times in row["runs_step_ms"].values()
    }
    measured = f"medians of {' or '.join(map(str, sorted(num_runs)))} interleaved runs"
    return (
        f"{MODEL}; {measured}. {'; '.join(sorted(machines))}: "
        "offload computes on one core and has its memory node on the other.\n"
        "Factors are the speed of 2 micro-batches against stock vLLM."
    )


def draw(rows: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Draw one panel a batch size and write a PNG of about 1,200 pixels."""
    batches = sorted({row["batch"] for row in rows})
    # The legend has the title: matplotlib would draw one over the other.
    figure, axes = new_figure(len(batches), "")
    figure.set_size_inches(10, 4.6)
    highest = max(row["step_ms"][side] for row in rows for side in SIDES)
    for axis, batch in zip(axes, batches, strict=True):
        points = [row for row in rows if row["batch"] == batch]
        draw_batch(axis, sorted(points, key=lambda row: row["context"]))
        axis.set(ylim=(0, 1.08 * highest), xlabel="context, tokens")
        axis.tick_params(labelleft=axis is axes[0])
    axes[0].set_ylabel("ms per step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=3,
        frameon=False,
        title=TITLE,
        title_fontsize=13,
    )
    figure.supxlabel(caption, fontsize=8, linespacing=1.5)
    figure.savefig(path, dpi=120)


def draw_batch(axis: Any, points: list[dict[str, Any]]) -> None:
    """Draw the lines of one batch size, and how they compare at the longest context."""
    contexts = [row["context"] for row in points]
    for side, (label, style) in SIDES.items():
        times_ms = [row["step_ms"][side] for row in points]
        axis.plot(contexts, times_ms, label=label, **style)
    last = points[-1]["step_ms"]
    factor = last[STOCK] / last[BEST]
    batch = points[-1]["batch"]
    axis.set_title(
        f"batch {batch}\n{factor:.2f}x at {contexts[-1]:,} tokens", fontsize=10
    )
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.margins(x=0.12)
    axis.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    main()
