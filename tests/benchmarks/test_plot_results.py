# SPDX-License-Identifier: Apache-2.0
"""The plot of the README is drawn from the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_plot_of_committed_results(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='needs the "plots" extra')
    path = tmp_path / "decode_step.png"
    script = root / "benchmarks" / "plot_results.py"
    run = subprocess.run(
        [sys.executable, script, "--output", path], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000
