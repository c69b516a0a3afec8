# SPDX-License-Identifier: Apache-2.0
"""benchmarks/paper.py runs as one command and prints every section."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_paper_benchmark(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(root / "benchmarks/paper.py"),
            "--output",
            str(tmp_path),
            "--no-plots",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("## ") == 12
    document = json.loads((tmp_path / "paper.json").read_text())
    batches = document["batch_v2"]["rows"]
    assert batches[-1][-1] == "2.22 (2.39)"
    prices = {(row[2], row[3]) for row in document["throughput_v2"]["rows"]}
    assert prices == {("20.32", "22.12"), ("40.64", "44.24")}
