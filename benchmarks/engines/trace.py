# SPDX-License-Identifier: Apache-2.0
"""``offline.py --trace-out``: record one decode step on both sides."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from engines import timeline
from engines.launch import as_option, offload_engine, pool_gib
from harness.memory_node import NodeProcess


def trace(arguments: argparse.Namespace, model: str, log: Path) -> None:
    """Record one step in two micro-batches, or as ``--micro-batches`` says last."""
    option = as_option(arguments.micro_batches[-1])
    batch, context = max(arguments.batch), max(arguments.context)
    point = {"batch": batch, "context": context, "steps": 6}
    with tempfile.TemporaryDirectory(prefix="trace-") as folder:
        node = _start_node(Path(folder), pool_gib(model, arguments), arguments)
        engine = offload_engine(
            arguments,
            model,
            log,
            "traced",
            num_microbatches=option,
            memory_nodes=[node.address],
            local_node_cpus="",
        )
        try:
            engine.wait_until_ready()
            of_worker = engine.ask({"trace": point})
        finally:
            engine.stop()
            node.stop()
        of_node = json.loads(Path(folder, "events.json").read_text("utf-8"))
    step = timeline.one_step(of_worker, of_node)
    timeline.write_chrome_trace(step, arguments.trace_out)
    title = f"One decode step, batch {batch}, context {context:,} ({arguments.dtype})"
    timeline.draw(step, title, arguments.trace_out.with_suffix(".png"))


def _start_node(
    folder: Path, kv_cache_gib: float, arguments: argparse.Namespace
) -> NodeProcess:
    """A memory node that writes its events when it ends."""
    return NodeProcess(
        f"unix:{folder}/node.sock",
        None,
        *("--cpus", arguments.node_cpus, "--kv-cache-gib", f"{kv_cache_gib}"),
        command=(sys.executable, timeline.__file__, str(folder / "events.json")),
    )
