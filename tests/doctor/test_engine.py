# SPDX-License-Identifier: Apache-2.0
"""Findings about vLLM itself, and the whole command beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from doctor_findings import CONFIGS, one
from node_process import NodeProcess, eventually, running_node
from package_copies import link_vllm, replace_in, run_command

from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.hooks.hook_table import known_releases

pytestmark = pytest.mark.long

_MAIN = "from vllm_attn_offload.cli import main; main()"
CHANGED = Path("engine", "arg_utils.py")
BEFORE = "def add_cli_args(parser: FlexibleArgumentParser)"
AFTER = "def add_cli_args(parser: FlexibleArgumentParser, more: int = 0)"


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of one run of the command."""

    status: int
    findings: list[Finding]


def ask(*arguments: str, paths: tuple[Path, ...] = ()) -> Answer:
    done = run_command("doctor", "--json", *arguments, paths=paths)
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise AssertionError(done.stdout + done.stderr) from None
    fields = [{k: v for k, v in each.items() if k != "subject"} for each in found]
    return Answer(done.returncode, [Finding(**each) for each in fields])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(
        tmp_path_factory.mktemp("node"), "--kv-cache-gib", "0.25"
    ) as process:
        yield process


def later_vllm(directory: Path) -> Path:
    """The installed vLLM but for its version and a signature that a patch wraps."""
    vllm = link_vllm(directory, CHANGED)
    replace_in(vllm / CHANGED, BEFORE, AFTER)
    version = vllm / "_version.py"
    version.unlink()
    version.write_text("__version__ = version = '0.99.1'\n", "utf-8")
    return directory


def broken_vllm(directory: Path, source: str) -> Path:
    """One that cannot be imported."""
    (directory / "vllm").mkdir()
    (directory / "vllm" / "__init__.py").write_text(source, "utf-8")
    (directory / "vllm" / "_version.py").write_text("__version__ = '0.32.0'\n", "utf-8")
    return directory


def serve_config(directory: Path, address: str) -> Path:
    """A file of `vllm serve`, with what only a server takes."""
    path = directory / "engine.yaml"
    model = CONFIGS / "llama-3-8b"
    path.write_text(
        f"model: {model}\nport: 8001\nhost: 127.0.0.1\nmax-model-len: 512\n"
        f"attention-offload-config:\n  memory-nodes: [{address}]\n"
    )
    return path


@pytest.fixture(scope="module")
def answers(
    node: NodeProcess, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answer]:
    """All runs at once: importing vLLM takes most of each."""
    place = tmp_path_factory.mktemp
    nodes = ("--memory-nodes", node.address)
    runs: dict[str, Any] = {
        "good": (
            *(str(CONFIGS / "llama-3-8b"), *nodes),
            *("--engine-options", "--max-model-len", "1024"),
            *("--dtype", "bfloat16"),
        ),
        "of a file": (
            *("--config", str(serve_config(place("file"), node.address))),
            *("--engine-options", "--tool-call-parser", "hermes", "--api-key", "k"),
        ),
        "refused": (str(CONFIGS / "deepseek-v2-lite"), *nodes),
        "later": (),
        "not importable": (),
        "crashing": (),
    }
    paths = {
        "later": later_vllm(place("later")),
        "not importable": broken_vllm(
            place("broken"), "raise ImportError('libtorch.so is missing')\n"
        ),
        "crashing": broken_vllm(place("crash"), "import os\nos.abort()\n"),
    }
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(ask, *run, paths=(paths[name],) if name in paths else ())
            for name, run in runs.items()
        }
        return {name: future.result() for name, future in started.items()}


def test_it_would_serve(answers: dict[str, Answer]) -> None:
    answer = answers["good"]
    bad = [each for each in answer.findings if each.severity == "fail"]
    assert (answer.status, bad) == (0, [])
    accepted = one(answer.findings, "engine", "ok").found
    assert accepted == (
        "vLLM would offload LlamaForCausalLM in bfloat16, up to 1,024 tokens a request"
    )
    pool = one(answer.findings, "pool", "ok").found
    assert "hold 2,048 tokens; a request has 1,024 at most" in pool
    assert "4 of vLLM's" in one(answer.findings, "patches", "ok").found
    assert "0.32" in one(answer.findings, "vLLM", "ok").found


def test_options_of_a_server(answers: dict[str, Answer]) -> None:
    answer = answers["of a file"]
    assert answer.status == 0
    accepted = one(answer.findings, "engine", "ok").found
    assert accepted.endswith("up to 512 tokens a request")


def test_refused_model(answers: dict[str, Answer]) -> None:
    """With the engine's own words."""
    answer = answers["refused"]
    assert answer.status == 1
    engine = one(answer.findings, "engine")
    assert "does not support multi-head latent attention" in engine.found
    assert "grouped-query attention" in engine.allowed


def test_later_version(answers: dict[str, Answer]) -> None:
    """Compared with the newest release whose names are known."""
    answer = answers["later"]
    assert answer.status == 1
    assert "found 0.99.1" in one(answer.findings, "vLLM").found
    assert "supports vLLM 0.32.x" in one(answer.findings, "patches").found
    (hooks,) = [each for each in answer.findings if each.check == "hooks"]
    assert hooks.severity != "ok"
    assert f"name(s) of vLLM differ from {known_releases()[-1]}" in hooks.found


def test_vllm_that_cannot_be_imported(answers: dict[str, Answer]) -> None:
    findings = answers["not importable"].findings
    assert "libtorch.so is missing" in one(findings, "patches").found
    assert "name(s) of vLLM differ" in one(findings, "hooks").found


def test_vllm_that_crashes(answers: dict[str, Answer]) -> None:
    """The other findings are there."""
    findings = answers["crashing"].findings
    assert "ended with signal 6" in one(findings, "vLLM").found
    one(findings, "versions", "ok")


def test_killed_command(tmp_path: Path) -> None:
    """The process that uses vLLM ends with it."""
    place = tmp_path / "pid"
    path = broken_vllm(
        tmp_path,
        "import os, pathlib, time\n"
        f"pathlib.Path({str(place)!r}).write_text(f'{{os.getpid()}}.')\n"
        "time.sleep(100)\n",
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _MAIN, "doctor"],
        env=os.environ | {"PYTHONPATH": str(path)},
        stdout=subprocess.DEVNULL,
    ) as command:
        written = eventually(lambda: place.exists() and place.read_text()[-1:], 60)
        command.kill()
    assert written
    pid = int(place.read_text().rstrip("."))
    assert eventually(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
