# SPDX-License-Identifier: Apache-2.0
"""``offline.py --sweep-nodes``: capacity and traffic of several local memory nodes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from engines.launch import offload_engine


def sweep_nodes(
    arguments: argparse.Namespace, model: str, log: Path
) -> list[dict[str, Any]]:
    """Capacity and traffic with one, two, ... local nodes of one size each."""
    rows = []
    for count in arguments.sweep_nodes:
        engine = offload_engine(
            arguments, model, log, f"{count} nodes", num_local_nodes=count
        )
        try:
            engine.wait_until_ready()
            context, steps = max(arguments.context), arguments.steps
            request = {"context": context, "steps": steps}
            alone = engine.ask({**request, "batch": 1})
            together = engine.ask({**request, "batch": max(arguments.batch)})
            rows.append(
                {
                    "nodes": count,
                    "capacity_tokens": engine.ask({"capacity": True}),
                    "expected_bytes": layer_bytes(model, arguments.dtype, count),
                    "busiest_of_one_request": alone["sums"]["busiest node"],
                    **together,
                }
            )
        finally:
            engine.stop()
    return rows


def layer_bytes(model: str, dtype: str, num_nodes: int) -> dict[str, float]:
    """Bytes per token and layer on all links, of both partitions.

    By heads q, k, v and the output travel once: (2 + 2 / G) e d, with G query heads per
    KV head and d their total size. By blocks every node gets q and answers with an
    output and a log-sum-exp (fp32), if it holds a part of the context.
    """
    config = json.loads(Path(model, "config.json").read_text("utf-8"))
    size, heads = config["hidden_size"], config["num_attention_heads"]
    item_bytes = 4 if dtype == "float32" else 2
    stored = 2 * size * config["num_key_value_heads"] / heads * item_bytes
    asked = 2 * size * item_bytes
    blocks = num_nodes * (asked + 4 * heads) if num_nodes > 1 else asked
    return {"heads": asked + stored, "blocks": blocks + stored}
