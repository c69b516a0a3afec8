#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints the dashboard: ``python generate.py >attention_offload.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from engine_rows import CAPACITY, LOSSES, WORTH
from node_rows import BALANCE, PROCESSES, QUEUEING, REFUSALS, WIRE
from panel import DATASOURCE, FULL_WIDTH, HEIGHT, Panel

_UP = "attn_offload:memory_node_up"
_SESSIONS = "attn_offload:session_info"
# Label, metric that has it, title.
_LABELS = (
    ("job", _UP, "Job"),
    ("model_name", _SESSIONS, "Model"),
    ("instance", _UP, "Instance"),
    ("engine_index", _SESSIONS, "Engine"),
    ("node", _UP, "Memory node"),
)
_ROWS: dict[str, tuple[Panel, ...]] = {
    "Is it worth it": WORTH,
    "Capacity": CAPACITY,
    "Balance": BALANCE,
    "Queueing between engines": QUEUEING,
    "Wire": WIRE,
    "Losses": LOSSES,
    "Processes of nodes": PROCESSES,
    "Refusals": REFUSALS,
}


def dashboard() -> dict[str, Any]:
    """As Grafana 10.3 and newer import it."""
    return {
        "uid": "vllm-attn-offload",
        "title": "vLLM attention offloading",
        "description": "Memory nodes that hold vLLM's KV cache and attend, and the "
        "engines that use them.",
        # Among vLLM's own dashboards.
        "tags": ["vllm", "attention-offload"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": _panels(),
    }


def _variables() -> list[dict[str, Any]]:
    source = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }
    return [source, *(_variable(*label) for label in _LABELS)]


def _variable(label: str, metric: str, title: str) -> dict[str, Any]:
    query = f"label_values({metric}, {label})"
    return {
        "name": label,
        "label": title,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": f"variable-{label}"},
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        # On load, and whenever the time range changes.
        "refresh": 2,
        "sort": 1,
    }


def _panels() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    y = 0
    for title, panels in _ROWS.items():
        place = {"h": 1, "w": FULL_WIDTH, "x": 0, "y": y}
        row = {"type": "row", "title": title, "collapsed": False, "panels": []}
        made.append({"id": len(made) + 1, "gridPos": place, **row})
        y = _place(panels, y + 1, made)
    return made


def _place(panels: Sequence[Panel], y: int, made: list[dict[str, Any]]) -> int:
    """Add panels in lines from ``y`` on; returns the line below them."""
    x = 0
    for panel in panels:
        if x + panel.width > FULL_WIDTH:
            x, y = 0, y + HEIGHT
        made.append(panel.json(len(made) + 1, x, y))
        x += panel.width
    return y + HEIGHT


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=2)
    sys.stdout.write("\n")
