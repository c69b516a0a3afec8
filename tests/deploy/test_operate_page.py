# SPDX-License-Identifier: Apache-2.0
"""The page for operators lists every metric and every alert, and links what exists."""

from __future__ import annotations

import re
from pathlib import Path

from queries import alerts

from vllm_attn_offload.metrics.catalogue import ALL_METRICS


def test_metrics(root: Path) -> None:
    """The table's rows are these lines, in any order."""
    page = (root / "docs" / "operate.md").read_text()
    rows = re.findall(r"^\| `attn_offload:.*$", page, re.M)
    expected = [
        f"| `{each.sample}` | {each.kind} | {', '.join(each.labels)} | {each.help} |"
        for each in ALL_METRICS
    ]
    assert sorted(rows) == sorted(expected)


def test_alerts(root: Path) -> None:
    page = (root / "docs" / "operate.md").read_text()
    _, _, section = page.partition("\n## Alerts\n")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", section, re.M)
    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in alerts()]


def test_links(root: Path) -> None:
    page = (root / "docs" / "operate.md").read_text()
    for target in re.findall(r"\]\((\.\.?/[^)#]+)", page):
        assert (root / "docs" / target).exists(), target
