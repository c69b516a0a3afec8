# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on: hardware, versions, commit, load."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

DISTRIBUTIONS = ("torch", "triton", "vllm", "vllm-attn-offload")


def describe() -> dict[str, object]:
    """Facts that stand beside every number of this run."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    )
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    flags = Path("/proc/cpuinfo").read_text()
    instructions = [
        name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags
    ]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": instructions,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "commit": git.stdout.strip() or None,
        "load_average": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
    }
