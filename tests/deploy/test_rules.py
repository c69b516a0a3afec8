# SPDX-License-Identifier: Apache-2.0
"""The alerts: their texts, what they ask for, and when they fire, by promtool."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from exported_labels import assert_exported
from queries import DEPLOY, Query, alert_queries, alerts

DIRECTORY = DEPLOY / "prometheus"
ALERTS = (
    *("NodeDown", "KvNearlyFull", "EngineRecovering", "RecoveryRepeated"),
    *("NodeImbalance", "QueueHigh", "OffloadDoesNotPay", "RefusedPeers"),
    "CertificateExpires",
)
#: What happened, why it matters, what to do.
PARTS = {"summary", "description", "action"}

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs promtool"
)


def promtool(*arguments: str) -> str:
    """What it says, run where the files are."""
    command = ("promtool", *arguments)
    ended = subprocess.run(command, cwd=DIRECTORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_alerts() -> None:
    assert tuple(rule["alert"] for rule in alerts()) == ALERTS


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_texts(rule: dict[str, Any]) -> None:
    assert rule["annotations"].keys() == PARTS
    for text in rule["annotations"].values():
        assert text.endswith("."), text
    assert rule["labels"]["severity"] in ("warning", "critical")
    named = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
    assert set(named) <= Query(rule["alert"], rule["expr"]).grouped()


@pytest.mark.parametrize("query", alert_queries(), ids=lambda query: query.place)
def test_query_asks_for_what_is_exported(query: Query) -> None:
    assert_exported(query)


def test_every_alert_is_seen_firing_and_quiet() -> None:
    tests = yaml.safe_load((DIRECTORY / "rules_test.yaml").read_text())["tests"]
    expected = {test["name"]: test["promql_expr_test"] for test in tests}
    assert len(expected) == len(tests) == 2 * len(ALERTS)
    for alert in ALERTS:
        (firing, *_), quiet = expected[alert], expected[f"{alert} stays quiet"]
        asked = f'ALERTS{{alertname="{alert}", alertstate="firing"}}'
        assert firing["expr"] == quiet[-1]["expr"] == asked
        assert len(firing["exp_samples"]) == 1
        assert quiet[-1]["exp_samples"] == []


@needs_promtool
def test_alerts_fire_and_stay_quiet() -> None:
    promtool("test", "rules", "rules_test.yaml")


@needs_promtool
def test_files_are_accepted() -> None:
    found = re.search(r"(\d+) rules found", promtool("check", "rules", "rules.yaml"))
    assert found is not None
    assert int(found[1]) == len(ALERTS)
    assert "scrape.yaml is valid" in promtool("check", "config", "scrape.yaml")
