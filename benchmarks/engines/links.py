# SPDX-License-Identifier: Apache-2.0
"""``offline.py --links``: what a longer or thinner link to the memory node costs."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engines.launch import EngineProcess, offload_engine, pool_gib
from engines.mode import EngineMode
from harness.progress import track
from harness.remote_nodes import RemoteNodes


class Link(NamedTuple):
    """A link to a memory node.

    Args:
        round_trip_ms: Added to every round trip.
        mbit_per_s: Bandwidth in either direction; 0: as it is.
    """

    round_trip_ms: float
    mbit_per_s: int

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read ``MS`` or ``MS@MBIT``."""
        delay, _, rate = text.partition("@")
        return cls(float(delay), int(rate or 0))

    def __str__(self) -> str:
        rate = f", {self.mbit_per_s:,} Mbit/s" if self.mbit_per_s else ""
        return f"+{self.round_trip_ms:g} ms{rate}"


def remote_engine(
    arguments: argparse.Namespace, model: str, log: Path, host: RemoteNodes
) -> EngineProcess:
    """An engine with a memory node on the other host."""
    node = host.start(pool_gib(model, arguments), arguments.node_cpus, is_relayed=True)
    return offload_engine(
        arguments,
        model,
        log,
        "remote",
        memory_nodes=[node["address"]],
        auth_token_file=node["auth_token_file"],
        local_node_cpus="",
    )


def sweep_links(
    arguments: argparse.Namespace,
    sides: Sequence[EngineProcess | EngineMode],
    host: RemoteNodes,
) -> list[dict[str, Any]]:
    """Median step of each side on every link; sides take turns."""
    batch, context = max(arguments.batch), max(arguments.context)
    rows: list[dict[str, Any]] = []
    for link in track(arguments.links, "links"):
        host.delay(link.round_trip_ms / 2)
        host.host.limit_bandwidth(link.mbit_per_s)
        runs: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(arguments.runs):
            for side in sides:
                request = {
                    "batch": batch,
                    "context": context,
                    "steps": arguments.steps,
                }
                runs[side.name].append(1e3 * side.ask(request)["step_s"])
        rows.append(
            {
                "link": str(link),
                "batch": batch,
                "context": context,
                "runs_step_ms": runs,
                "step_ms": {name: statistics.median(ms) for name, ms in runs.items()},
            }
        )
    return rows
