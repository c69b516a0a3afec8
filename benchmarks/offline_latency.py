# SPDX-License-Identifier: Apache-2.0
"""``offline.py --links``: what a longer or thinner link to the memory node costs."""

from __future__ import annotations

import argparse
import statistics
from typing import Any, NamedTuple, TextIO

from offline_engines import EngineProcess, offload_engine, pool_gib
from remote_nodes import RemoteNodes
from rich.progress import track

MICRO_BATCHES = (1, 2)


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


def start_engines(
    arguments: argparse.Namespace, model: str, log: TextIO, host: RemoteNodes
) -> list[EngineProcess]:
    """An engine with one micro-batch and one with two, each with its own node."""
    engines = []
    for count in MICRO_BATCHES:
        node = host.start(
            pool_gib(model, arguments), arguments.node_cpus, is_relayed=True
        )
        engine = offload_engine(
            arguments,
            model,
            log,
            str(count),
            num_microbatches=count,
            memory_nodes=[node["address"]],
            auth_token_file=node["auth_token_file"],
            local_node_cpus="",
        )
        engines.append(engine)
    return engines


def sweep_links(
    arguments: argparse.Namespace, engines: list[EngineProcess], host: RemoteNodes
) -> list[dict[str, Any]]:
    """Median step of every engine on every link; engines take turns."""
    batch, context = max(arguments.batch), max(arguments.context)
    rows: list[dict[str, Any]] = []
    for link in track(arguments.links, description="links"):
        host.delay(link.round_trip_ms / 2)
        host.host.limit_bandwidth(link.mbit_per_s)
        runs: dict[str, list[float]] = {engine.name: [] for engine in engines}
        for _ in range(arguments.runs):
            for engine in engines:
                request = {
                    "batch": batch,
                    "context": context,
                    "steps": arguments.steps,
                }
                runs[engine.name].append(1e3 * engine.ask(request)["step_s"])
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
