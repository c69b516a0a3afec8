# SPDX-License-Identifier: Apache-2.0
"""Two minutes of faults under load: nothing fails, nothing is wrong, nothing leaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
#: This seed begins with rotate, drop, descriptors, stop, garbage, kill, kill.
SEED = 2

pytestmark = [pytest.mark.long, pytest.mark.alone]


def test_two_minutes_of_chaos(smollm2: str) -> None:
    run = subprocess.run(
        [sys.executable, str(CHAOS), "--minutes", "2", "--seed", str(SEED)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-4000:]
