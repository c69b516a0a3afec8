# SPDX-License-Identifier: Apache-2.0
"""Queries of the dashboard and of the alerts, and what is in them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "attention_offload.json"
RULES = DEPLOY / "prometheus" / "rules.yaml"

_METRIC = r"\b((?:(?:attn_offload|vllm):|process_)\w+)\s*(?:\{([^}]*)\})?"
_GROUPING = r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)"


@dataclass(frozen=True)
class Query:
    """One expression, and where it is."""

    place: str
    expression: str

    def concrete(self, window: str = "1m") -> str:
        """Return it with every variable of Grafana replaced: all of everything."""
        chosen = re.sub(r"\$__(?:rate_interval|range)", window, self.expression)
        return re.sub(r'"\$[a-z_]+"', '".*"', chosen)

    def selectors(self) -> list[tuple[str, list[str]]]:
        """Return the metrics that it asks for, each with the labels that choose."""
        return [
            (name, re.findall(r"(\w+)\s*[=!]~?", matchers or ""))
            for name, matchers in re.findall(_METRIC, self.expression)
        ]

    def grouped(self) -> set[str]:
        """Return the labels that it groups and joins by, but those that it makes."""
        lists = re.findall(_GROUPING, self.expression)
        names = {name.strip() for names in lists for name in names.split(",")}
        return names - set(re.findall(r', "(\w+)", "\$1"', self.expression))


def dashboard() -> dict[str, Any]:
    """The dashboard as it is shipped."""
    return json.loads(DASHBOARD.read_text())


def panels() -> list[dict[str, Any]]:
    """Its panels, without the titles of rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def alerts() -> list[dict[str, Any]]:
    """The alerts as they are shipped."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries() -> list[Query]:
    """Those of all panels."""
    return [
        Query(f"{panel['title']}, {target['refId']}", target["expr"])
        for panel in panels()
        for target in panel["targets"]
    ]


def alert_queries() -> list[Query]:
    """Those of all alerts."""
    return [Query(rule["alert"], rule["expr"]) for rule in alerts()]
