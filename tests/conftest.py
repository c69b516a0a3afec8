# SPDX-License-Identifier: Apache-2.0
"""What every test may rely on: the environment, a seed, and the small real model."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
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


def pytest_configure() -> None:
    """Give every worker of pytest-xdist CPUs that the others compute less on.

    On two CPUs engines compute on one and have their nodes on the other one; every
    other worker turns that round.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cpus = sorted(os.sched_getaffinity(0))
    share = len(cpus) // num_workers
    if num_workers > 1 and share > 1:
        os.sched_setaffinity(0, cpus[worker * share : (worker + 1) * share])
    elif num_workers > 1:
        torch.set_num_threads(1)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cpus[-(worker % 2)])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes longest, so that workers end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def node_cpu() -> str:
    """A CPU that engines do not compute on, where they have a choice."""
    cpus = os.sched_getaffinity(0)
    is_turned = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == str(max(cpus))
    return str(min(cpus) if is_turned else max(cpus))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def once(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[Path], None]], Path]:
    """``once(name, make)``: a directory that ``make`` fills once in the whole run.

    Workers of pytest-xdist share it; who asks while another one makes it waits.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], None]) -> Path:
        directory = base / name
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():
                partial = Path(tempfile.mkdtemp(dir=base, prefix=f"{name}-"))
                make(partial)
                partial.rename(directory)
        return directory

    return get


@pytest.fixture(scope="session")
def architectures(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Folder of every architecture's config.json, and of what vLLM says of each.

    One process asks all classes, because importing vLLM takes as long as they do:
    `helpers/kv_cache_specs.py` says what a line of ``replies.jsonl`` holds.
    """
    script = ROOT / "tests" / "helpers" / "kv_cache_specs.py"

    def ask(folder: Path) -> None:
        child = subprocess.run(
            [sys.executable, str(script), str(folder)],
            env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert child.returncode == 0, child.stderr
        lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
        (folder / "replies.jsonl").write_text("\n".join(lines))

    return once("architectures", ask)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Directory of the converted SmolLM2-135M-Instruct checkpoint."""
    script = ROOT / "benchmarks" / "harness" / "smollm2.py"
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]
