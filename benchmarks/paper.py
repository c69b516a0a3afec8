# SPDX-License-Identifier: Apache-2.0
"""Regenerate what Lamina (arXiv 2405.01814) publishes and a model can compute.

Ours beside the published number, as tables, JSON and PNGs. Nothing is fitted.
    python benchmarks/paper.py --traces AzureLLMInferenceTrace_conv.csv ...
`simulate` replays a trace on one deployment and on its alternatives instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lamina.replay import add_simulate, run_simulate
from lamina.section import load_traces
from lamina.v1 import attention_share, batch_v1, per_dollar_v1, rtx4080_tensor_parallel
from lamina.v2 import (
    batch_v2,
    dop_sweep,
    exchange_latency,
    h20_alone,
    min_bandwidth,
    overlap_bound,
    table_1,
    throughput_v2,
)

from vllm_attn_offload.planner.plot import new_figure

SECTIONS = (
    table_1,
    attention_share,
    rtx4080_tensor_parallel,
    min_bandwidth,
    exchange_latency,
    batch_v2,
    batch_v1,
    throughput_v2,
    h20_alone,
    dop_sweep,
    per_dollar_v1,
    overlap_bound,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Recompute the paper, or simulate; returns the exit status (2: bad input)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/paper"))
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    add_simulate(parser.add_subparsers(dest="command"))
    args = parser.parse_args(argv)
    try:
        return run_simulate(args) if args.command == "simulate" else recompute(args)
    except ValueError as error:
        print(f"paper.py: error: {error}", file=sys.stderr)
        return 2


def recompute(args: argparse.Namespace) -> int:
    """Print every section and write paper.md, paper.json and PNGs.

    Raises:
        ValueError: A trace cannot be read, or matplotlib is missing.
    """
    traces = load_traces(args.traces)
    args.output.mkdir(parents=True, exist_ok=True)
    sections = [build(traces) for build in SECTIONS]
    for section in sections:
        print(section.text())
        if section.plot is not None and not args.no_plots:
            figure, axes = new_figure(1, section.title)
            section.plot(axes)
            figure.savefig(args.output / f"{section.key}.png", dpi=120)
    text = "\n".join(section.text() for section in sections)
    (args.output / "paper.md").write_text(f"# Lamina, recomputed\n\n{text}", "utf-8")
    document = {
        s.key: {"header": s.header, "rows": s.rows, "remarks": s.remarks} | s.facts
        for s in sections
    }
    (args.output / "paper.json").write_text(json.dumps(document, indent=1), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
