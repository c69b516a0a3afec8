# SPDX-License-Identifier: Apache-2.0
"""Virtual environments that hold the built wheel and nothing of this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

#: Where compilers are found in these environments: nowhere.
NO_COMPILER = "/nonexistent"


def install_wheel(directory: Path, dist: Path, python: str = sys.executable) -> Path:
    """Make an environment with the wheel and what it requires, from pip's index.

    Args:
        directory: Where; it must not exist.
        dist: Holds the wheel.
        python: Runs in it.

    Returns:
        The folder of its commands. There is no pip in it.
    """
    return _make(directory, dist, [], python)


def install_wheel_beside_vllm(directory: Path, dist: Path) -> Path:
    """The same with the packages of this environment, vLLM among them, behind it.

    But for the checkout's editable install: nothing reads this environment's ``.pth``
    files, and the wheel's own metadata comes first.
    """
    commands = _make(directory, dist, ["--no-deps"], sys.executable)
    own = site_packages(directory)
    (own / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return commands


def site_packages(directory: Path) -> Path:
    """Where an environment keeps its packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return directory / "lib" / version / "site-packages"


def _make(directory: Path, dist: Path, options: list[str], python: str) -> Path:
    (wheel,) = dist.glob("*.whl")
    commands = directory / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(commands / "python")]
    for command in (
        [python, "-m", "venv", "--without-pip", str(directory)],
        [*pip, "install", "--only-binary", ":all:", *options, str(wheel)],
    ):
        run = subprocess.run(
            command,
            env=os.environ | {"PATH": NO_COMPILER},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return commands
