# SPDX-License-Identifier: Apache-2.0
"""`paper.py simulate` replays a trace, with failures, and explains bad options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paper import main

PAIR = ["--compute", "1xH100", "--memory", "2xH20"]
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.68,374,44
2023-11-16 18:15:50.99,396,109
2023-11-16 18:15:51.22,879,55
"""


@pytest.fixture
def model(root: Path) -> str:
    return str(root / "tests" / "planner" / "configs" / "llama-3-8b")


def test_simulate_with_failures(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    arguments = ["simulate", model, *PAIR, "--trace", str(trace)]
    failures = ["--straggler", "0.01:3", "--node-loss", "4.6:2"]
    assert main([*arguments, *failures]) == 0
    out = capsys.readouterr().out
    assert "Trace of 3 requests" in out
    assert "1xH100 + 2xH20, n=2" in out
    assert main([*arguments, *failures, "--json"]) == 0
    lossy = json.loads(capsys.readouterr().out)["1xH100 + 2xH20, n=1"]
    assert main([*arguments, "--json"]) == 0
    quiet = json.loads(capsys.readouterr().out)["1xH100 + 2xH20, n=1"]
    assert lossy["num_finished"] == quiet["num_finished"] == 3
    # Two requests run when the node dies after 4.6 s.
    assert (lossy["num_preemptions"], quiet["num_preemptions"]) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "without --trace"),
        (["--trace", "no.csv", "--straggler", "2:3"], "The share of steps is at most"),
        (["--trace", "no.csv"], "Cannot read trace no.csv"),
    ],
)
def test_simulate_errors(
    model: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main(["simulate", model, *PAIR, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count(". ") >= 2
