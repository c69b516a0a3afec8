# SPDX-License-Identifier: Apache-2.0
"""A panel of the dashboard, and its JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["timeseries", "stat", "table"]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: Of a Grafana row.
FULL_WIDTH = 24
HEIGHT = 8
#: Columns that say nothing here.
_HIDDEN = dict.fromkeys(("Time", "Value"), True)


@dataclass(frozen=True)
class Panel:
    """What a panel shows.

    Args:
        title: Short.
        description: What it shows and how to read it.
        unit: Grafana's name of a unit.
        targets: Legend by PromQL expression; of tables only the expression counts.
        kind: Of Grafana's panels.
        is_stacked: Whether the series add up.
        limit: Value from which on it is red; None: there is none.
        floor: Value below which it is red; None: there is none.
        width: In Grafana's columns.
    """

    title: str
    description: str
    unit: str
    targets: dict[str, str]
    kind: Kind = "timeseries"
    is_stacked: bool = False
    limit: float | None = None
    floor: float | None = None
    width: int = 8

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """As Grafana reads it.

        Args:
            number: Identifier within the dashboard.
            x: Column.
            y: Line.
        """
        panel = {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"h": HEIGHT, "w": self.width, "x": x, "y": y},
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": self._options(),
            "targets": [
                self._target(index, *target)
                for index, target in enumerate(self.targets.items())
            ],
        }
        if self.kind == "table":
            options = {"excludeByName": _HIDDEN}
            panel["transformations"] = [{"id": "organize", "options": options}]
        return panel

    def _target(self, index: int, expression: str, legend: str) -> dict[str, Any]:
        is_table = self.kind == "table"
        return {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": expression,
            "legendFormat": legend,
            "format": "table" if is_table else "time_series",
            "instant": self.kind != "timeseries",
            "range": self.kind == "timeseries",
        }

    def _defaults(self) -> dict[str, Any]:
        has_floor = self.floor is not None
        steps: list[dict[str, Any]] = [
            {"color": "red" if has_floor else "green", "value": None}
        ]
        if has_floor:
            steps.append({"color": "green", "value": self.floor})
        if self.limit is not None:
            steps.append({"color": "red", "value": self.limit})
        defaults: dict[str, Any] = {
            "unit": self.unit,
            "color": {"mode": "palette-classic"},
            "thresholds": {"mode": "absolute", "steps": steps},
        }
        if self.kind == "timeseries":
            defaults["min"] = 0
            defaults["custom"] = {
                "drawStyle": "line",
                "fillOpacity": 20 if self.is_stacked else 0,
                "lineWidth": 1,
                "showPoints": "never",
                "spanNulls": False,
                "stacking": {"mode": "normal" if self.is_stacked else "none"},
                "thresholdsStyle": {"mode": "off" if self.limit is None else "line"},
            }
        elif self.kind == "stat":
            defaults["color"] = {"mode": "thresholds"}
        return defaults

    def _options(self) -> dict[str, Any]:
        if self.kind == "table":
            return {"showHeader": True}
        if self.kind == "stat":
            reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
            return {"reduceOptions": reduce, "textMode": "value_and_name"}
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
