# SPDX-License-Identifier: Apache-2.0
"""A memory node from the wheel, on a host without compiler, torch and vLLM."""

from __future__ import annotations

import os
import subprocess
import time
import zipfile
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from node_process import NodeProcess, running_node
from paged_batch import PagedBatch, max_error
from raw_session import RawSession, make_geometry
from wheel_environment import NO_COMPILER, install_wheel, site_packages

NUM_BLOCKS = 64
MAX_INSTALLED_MB, MAX_WHEEL_MB = 130, 1
KERNELS = "--attention-kernel auto and cpp, with --device cpu"


class Environment(NamedTuple):
    """An environment with the wheel; ``seconds`` is what its installation took."""

    directory: Path
    commands: Path
    seconds: float


@pytest.fixture(scope="module")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    directory = tmp_path_factory.mktemp("node") / "environment"
    started = time.monotonic()
    commands = install_wheel(directory, dist)
    return Environment(directory, commands, time.monotonic() - started)


def run_node(
    environment: Environment, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a node that cannot start."""
    command = [environment.commands / "vllm-memory-node", "--kv-cache-gib", "0.01"]
    return subprocess.run(
        [*command, "--listen", "127.0.0.1:0", *options],
        env=os.environ | {"PATH": NO_COMPILER} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def attend(node: NodeProcess) -> None:
    """Two steps of three requests, in blocks that held NaN."""
    geometry = make_geometry()
    batch = PagedBatch(geometry, NUM_BLOCKS, 3)
    with closing(RawSession(node.address, geometry, NUM_BLOCKS)) as session:
        assert session.control.info.attention_kernel.startswith("cpp (")
        step, nans = batch.poison(NUM_BLOCKS)
        session.send_step(step)
        assert session.attend(1, nans)[0].isnan().all()
        for num_new in ([20, 5, 40], [1, 1, 1]):
            step, qkv = batch.grow(num_new)
            session.send_step(step)
            out, lse = session.attend(1, qkv, want_lse=True)
            exact, exact_lse = batch.expected(torch.float64)
            torch.testing.assert_close(out.double(), exact, atol=4e-6, rtol=1e-6)
            assert lse is not None
            assert max_error(lse, exact_lse) < 3e-6


def test_node_attends_from_the_wheel(
    environment: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the compiled kernel of the wheel, and without torch."""
    packages = site_packages(environment.directory)
    command = [environment.commands / "vllm-memory-node"]
    options = ("--kv-cache-gib", "0.1")
    with running_node(tmp_path, *options, command=command, PATH=NO_COMPILER) as node:
        maps = Path(f"/proc/{node.process.pid}/maps").read_text()
        assert str(packages / "vllm_attn_offload/native/_native.lib.so") in maps
        attend(node)
    with capsys.disabled():
        print(  # noqa: T201
            f"\nwheel: installed in {environment.seconds:.1f} s, node ready after "
            f"{node.start_s:.2f} s"
        )


def test_sizes(
    environment: Environment, dist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all installed files, pip not among them, in units of 10^6 bytes."""
    packages = site_packages(environment.directory)
    assert not (packages / "torch").exists()
    files = [path for path in packages.rglob("*") if path.is_file()]
    installed = sum(path.stat().st_size for path in files) / 1e6
    (wheel,) = dist.glob("*.whl")
    packed = wheel.stat().st_size / 1e6
    with capsys.disabled():
        print(f"\nwheel: {packed:.2f} MB, installed: {installed:.0f} MB")  # noqa: T201
    assert packed < MAX_WHEEL_MB
    assert installed < MAX_INSTALLED_MB


@pytest.mark.parametrize("command", ["vllm-memory-node", "vllm-attn-offload"])
def test_commands_need_no_torch(environment: Environment, command: str) -> None:
    result = subprocess.run(
        [environment.commands / command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert command in result.stdout


@pytest.mark.parametrize(
    ("option", "value", "missing", "allowed", "extra"),
    [
        ("--attention-kernel", "torch", "torch", KERNELS, "torch"),
        ("--attention-kernel", "triton", "torch and triton", KERNELS, "gpu-node"),
        ("--device", "cuda:0", "torch and triton", "--device cpu", "gpu-node"),
    ],
)
def test_missing_extra(
    environment: Environment,
    option: str,
    value: str,
    missing: str,
    allowed: str,
    extra: str,
) -> None:
    result = run_node(environment, option, value)
    assert result.returncode == 1
    assert (
        f"{option} {value} was given, and there is no {missing} here. Allowed without: "
        f"{allowed}. Leave the option out, or run: "
        f"pip install 'vllm-attn-offload[{extra}]'"
    ) in result.stderr
    assert "Traceback" not in result.stderr


def test_no_kernel_at_all(environment: Environment, dist: Path, tmp_path: Path) -> None:
    """Neither torch nor the compiled one, as where no compiler built the package."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    next(tmp_path.rglob("_native.lib.so")).unlink()
    result = run_node(environment, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "the compiled CPU kernel is missing" in result.stderr
    assert "apt install g++" in result.stderr
    assert "pip install 'vllm-attn-offload[torch]'" in result.stderr
    assert "Traceback" not in result.stderr
