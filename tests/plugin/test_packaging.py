# SPDX-License-Identifier: Apache-2.0
"""What the wheel holds, and that vLLM's own imports do not notice the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from vllm_attn_offload import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_attn_offload"
SOURCES = (PACKAGE, "triton_kernels", "patches", "setup.py", "pyproject.toml")
SITE_PACKAGES = sysconfig.get_path("purelib")

HAS_TRITON_KERNELS = """
from vllm.utils.import_utils import has_triton_kernels
print("answer:", has_triton_kernels())
"""
IMPORT_WITHOUT_VLLM = """
import importlib, pkgutil, sys
sys.modules["vllm"] = None  # any import of vLLM raises
for name in ("memory_node", "transport", "triton_kernels"):
    package = importlib.import_module("vllm_attn_offload." + name)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: an in-tree build packs what older ones left."""
    checkout = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in (*SOURCES, "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index"]
    result = subprocess.run(
        [*command, "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return next((checkout / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the wheel as an installation does."""
    directory = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def run_python(code: str, *, path: list[str], cwd: Path) -> str:
    """Run ``code`` with exactly ``path`` after the standard library.

    ``-S`` skips site-packages and its .pth files, hence this checkout's editable
    install; ``-P`` keeps the working directory off the path.
    """
    result = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def vllm_answer(path: list[str], cwd: Path) -> str:
    output = run_python(HAS_TRITON_KERNELS, path=path, cwd=cwd)
    return next(line for line in output.splitlines() if line.startswith("answer:"))


@pytest.fixture(scope="module")
def answer_without_plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vllm_answer([SITE_PACKAGES], cwd=tmp_path_factory.mktemp("elsewhere"))


def test_wheel_contents(wheel: Path) -> None:
    assert wheel.name.startswith(f"{PACKAGE}-{__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {PACKAGE}
    for source in (PACKAGE, "triton_kernels", "patches"):
        prefix = "" if source == PACKAGE else f"{PACKAGE}/"
        for module in (ROOT / source).rglob("*.py"):
            assert f"{prefix}{module.relative_to(ROOT)}" in names
    assert f"{PACKAGE}/py.typed" in names


def test_wheel_entry_points(installed: Path) -> None:
    parser = ConfigParser()
    parser.read(next(installed.glob("*.dist-info/entry_points.txt")))
    assert dict(parser["vllm.general_plugins"]) == {
        "attn_offload": f"{PACKAGE}.plugin:register"
    }
    assert parser["console_scripts"]["vllm-memory-node"] == (
        f"{PACKAGE}.cli:memory_node_main"
    )


def test_base_install_does_not_require_vllm(installed: Path) -> None:
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    requirements = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist:")
    ]
    assert requirements
    assert not [line for line in requirements if "vllm" in line and "extra" not in line]


def test_memory_node_imports_without_vllm(installed: Path) -> None:
    path = [str(installed), SITE_PACKAGES]
    imported = run_python(IMPORT_WITHOUT_VLLM, path=path, cwd=installed)
    assert f"{PACKAGE}.memory_node." in imported
    assert f"{PACKAGE}.triton_kernels." in imported


def test_triton_kernels_elsewhere(installed: Path, answer_without_plugin: str) -> None:
    answer = vllm_answer([str(installed), SITE_PACKAGES], cwd=installed)
    assert answer == answer_without_plugin


def test_triton_kernels_under_pytest(answer_without_plugin: str) -> None:
    """From the checkout, on the path on which this very test runs."""
    assert str(ROOT) not in map(os.path.abspath, sys.path)
    assert vllm_answer(sys.path, cwd=ROOT) == answer_without_plugin
