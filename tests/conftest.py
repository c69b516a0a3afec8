# SPDX-License-Identifier: Apache-2.0
"""What every test may rely on: the environment, a seed, and the small real model."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import tiny_llama

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
def dist(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The sdist, and the wheel built from it, as releases have them; and a ``log``."""

    def build(directory: Path) -> None:
        child = subprocess.run(
            [ROOT / ".ci" / "dist", directory],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
        (directory / "log").write_text(child.stdout)

    return once("dist", build)


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


@pytest.fixture(scope="session")
def tiny_model(
    smollm2: str, once: Callable[[str, Callable[[Path], None]], Path]
) -> str:
    """Two layers of random weights with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    def save(directory: Path) -> None:
        tiny_llama.save(directory, len(AutoTokenizer.from_pretrained(smollm2)))
        for file in Path(smollm2).glob("*token*"):
            shutil.copy(file, directory)

    return str(once("tiny-llama", save))


@pytest.fixture(scope="session")
def tiny_tokens(
    tiny_model: str, once: Callable[[str, Callable[[Path], None]], Path]
) -> list[list[int]]:
    """Stock vLLM's greedy tokens of the tiny model's prompts."""

    def generate(directory: Path) -> None:
        output = str(directory / "result.json")
        command = [sys.executable, str(tiny_llama.__file__), tiny_model, output]
        stock = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert stock.returncode == 0, stock.stderr[-4000:] + stock.stdout[-4000:]

    output = once("tiny-llama-stock", generate) / "result.json"
    expected = json.loads(output.read_text("utf-8"))["tokens"]
    assert len({token for tokens in expected for token in tokens}) > 12
    return expected
