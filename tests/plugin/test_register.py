# SPDX-License-Identifier: Apache-2.0
"""The entry point: what an installed plugin does to vLLM, used and unused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_attn_offload.versions import is_tested, untested_message

PROBE = Path(__file__).with_name("probe.py")


def start_probe(model: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROBE), model],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def reports(smollm2: str) -> list[dict[str, Any]]:
    """What fresh processes of vLLM with and without us report; see ``probe.py``."""
    probes = [start_probe(smollm2), start_probe(smollm2, VLLM_PLUGINS="")]
    found = []
    for process in probes:
        log, _ = process.communicate(timeout=120)
        assert process.returncode == 0, log
        (report,) = [line for line in log.splitlines() if line.startswith("{")]
        found.append(json.loads(report) | {"log": log})
    return found


@pytest.fixture
def installed(reports: list[dict[str, Any]]) -> dict[str, Any]:
    return reports[0]


@pytest.fixture
def absent(reports: list[dict[str, Any]]) -> dict[str, Any]:
    return reports[1]


def test_flags_in_every_command(installed: dict[str, Any]) -> None:
    assert installed["commands"] == {
        command: {"attention_offload": {"kv_cache_gib": 4}}
        for command in ("serve", "bench throughput", "bench latency")
    }


def test_flags_absent_without_the_plugin(absent: dict[str, Any]) -> None:
    assert set(absent["commands"].values()) == {"unrecognized"}


def test_unused_plugin_changes_nothing(
    installed: dict[str, Any], absent: dict[str, Any]
) -> None:
    assert installed["plugin"]["is_applied"]
    assert not absent["plugin"]["is_applied"]
    assert installed["engine"] == absent["engine"]


def test_register_twice(installed: dict[str, Any]) -> None:
    assert installed["plugin"]["is_same_after_second_register"]


def test_untested_version(installed: dict[str, Any]) -> None:
    """vLLM is left alone with one warning, and only using the feature raises."""
    untested = installed["untested"]
    assert not untested["is_applied"]
    assert untested["error"].startswith("PatchError: vllm-attn-offload supports vLLM ")
    assert "0.32.x and 0.33.x; found 0.34.0" in untested["error"]
    assert "--distributed-executor-backend" in untested["error"]
    warning = (
        "found 0.34.0. Install vLLM 0.32 or 0.33, or run without attention "
        "offloading. vLLM itself is not touched."
    )
    assert installed["log"].count(warning) == 1


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.32.0", True),
        ("0.32.4+cpu", True),
        ("0.32.1rc1", True),
        ("0.33.0", True),
        ("0.33.1+cpu", True),
        ("0.31.9", False),
        ("0.34.0", False),
        ("0.320.0", False),
        ("1.32.0", False),
        ("dev", False),
    ],
)
def test_is_tested(version: str, expected: bool) -> None:
    assert is_tested(version) is expected
    assert version in untested_message(version)
