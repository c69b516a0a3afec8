# SPDX-License-Identifier: Apache-2.0
"""The environment of a result: hardware, versions, commit, load."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTIONS = ("torch", "triton", "vllm", "vllm-attn-offload")
#: Flags of the kernel for what the compiled attention distinguishes, best first.
ISAS = {"avx512_bf16": "avx512-bf16", "avx512f": "avx512", "avx2": "avx2"}
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe() -> dict[str, object]:
    """Return what every result file records about its run."""
    about, flags = _cpu(), _flags()
    return {
        "cpu": _field(about, "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "isa": next((isa for flag, isa in ISAS.items() if flag in flags), None),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
        "commit": _commit(),
        "load_average": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
    }


def cpu_dtype() -> str:
    """The dtype that models are served in on this CPU: bf16 needs instructions."""
    return "bfloat16" if "avx512_bf16" in _flags() else "float32"


def result_path(output: Path, name: str) -> Path:
    """A file for results: ``output``, or in a directory one that names the machine."""
    about = describe()
    machine = f"cpu-{about['cores']}core-{about['isa']}"
    return output / f"{name}-{machine}.json" if output.is_dir() else output


def _cpu() -> str:
    return Path("/proc/cpuinfo").read_text()


def _flags() -> set[str]:
    return set(_field(_cpu(), "flags").split())


def _field(about: str, name: str) -> str:
    for line in about.splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
