# SPDX-License-Identifier: Apache-2.0
"""Grafana's dashboard is what its script makes, and asks for what is exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from exported_labels import assert_exported, exported_labels
from queries import DASHBOARD, Query, dashboard, dashboard_queries, panels

from vllm_attn_offload.metrics.catalogue import ALL_METRICS

ROWS = (
    *("Is it worth it", "Capacity", "Balance", "Queueing between engines", "Wire"),
    *("Losses", "Processes of nodes", "Refusals"),
)


def _overlap(first: dict[str, Any], second: dict[str, Any]) -> bool:
    ours, theirs = first["gridPos"], second["gridPos"]
    return all(
        ours[start] < theirs[start] + theirs[size]
        and theirs[start] < ours[start] + ours[size]
        for start, size in (("x", "w"), ("y", "h"))
    )


def test_is_generated() -> None:
    """``python generate.py >attention_offload.json`` brings it up to date."""
    script = DASHBOARD.with_name("generate.py")
    command = [sys.executable, "-B", script]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert made == DASHBOARD.read_text()


def test_frame() -> None:
    """Found beside vLLM's dashboards, and imported anywhere."""
    shown = dashboard()
    assert "vllm" in shown["tags"]
    assert shown["schemaVersion"] >= 39
    assert "id" not in shown  # Grafana gives it one
    names = [variable["name"] for variable in shown["templating"]["list"]]
    assert names == [
        *("datasource", "job", "model_name", "instance", "engine_index", "node")
    ]
    rows = [panel["title"] for panel in shown["panels"] if panel["type"] == "row"]
    assert rows == list(ROWS)


def test_panels() -> None:
    """Each says what it shows and in what unit, and hides no other."""
    everything = dashboard()["panels"]
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        if panel["type"] != "table":
            assert all(each["legendFormat"] for each in panel["targets"])
    assert len({panel["id"] for panel in everything}) == len(everything)
    for first, second in combinations(everything, 2):
        assert not _overlap(first, second), (first["title"], second["title"])
    assert all(
        panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in everything
    )


@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda query: query.place)
def test_query_asks_for_what_is_exported(query: Query) -> None:
    assert_exported(query)


def test_every_metric_is_shown() -> None:
    shown = {name for query in dashboard_queries() for name, _ in query.selectors()}
    assert {each.sample for each in ALL_METRICS} <= shown


def test_legends_name_labels() -> None:
    """What a legend shows is a label of the query's result."""
    exported = exported_labels()
    for panel in panels():
        for target in panel["targets"]:
            query = Query(panel["title"], target["expr"])
            known = set().union(*(exported[name] for name, _ in query.selectors()))
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= known, panel["title"]


def test_variables_ask_for_what_is_exported() -> None:
    exported = exported_labels()
    for variable in dashboard()["templating"]["list"][1:]:
        query = variable["query"]["query"]
        found = re.fullmatch(r"label_values\((\S+), (\w+)\)", query)
        assert found is not None, query
        assert found[2] in exported[found[1]]


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_queries_are_promql(tmp_path: Path) -> None:
    """By Prometheus' own parser."""
    rules = [
        {"record": f"query:number:{index}", "expr": query.concrete()}
        for index, query in enumerate(dashboard_queries())
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    command = ["promtool", "check", "rules", file]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
