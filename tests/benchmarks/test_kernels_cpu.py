# SPDX-License-Identifier: Apache-2.0
"""The arena must hold the largest batch, which is said before anything is timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_small_arena_is_refused(root: Path) -> None:
    command = [sys.executable, str(root / "benchmarks" / "kernels_cpu.py")]
    small = subprocess.run(
        [*command, "--arena-mib", "64"], capture_output=True, text=True
    )
    assert small.returncode == 2
    assert "--arena-mib 64 does not hold" in small.stderr
    assert "at least 256. Pass --arena-mib 256" in small.stderr
