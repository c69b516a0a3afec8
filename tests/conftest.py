# SPDX-License-Identifier: Apache-2.0
"""What every test may rely on: the environment, a seed, and the small real model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# vLLM imports a package called triton_kernels and would find our folder of that name
# if the checkout were importable.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
if not torch.cuda.is_available():
    # Before anything imports Triton, whose own library is decorated at that moment.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Directory of the converted SmolLM2-135M-Instruct checkpoint."""
    script = ROOT / "benchmarks" / "harness" / "smollm2.py"
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]
