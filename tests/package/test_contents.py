# SPDX-License-Identifier: Apache-2.0
"""What a release holds, and that vLLM's own imports do not notice the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from vllm_attn_offload import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_attn_offload"
EXTRAS = {"cpu", "cuda", "gpu-node", "torch", "test", "plots", "ray"}
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
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


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
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {PACKAGE}
    for source in (PACKAGE, "triton_kernels", "patches"):
        prefix = "" if source == PACKAGE else f"{PACKAGE}/"
        for module in (ROOT / source).rglob("*.py"):
            assert f"{prefix}{module.relative_to(ROOT)}" in names
    for suffix in ("toml", "txt", "typed"):
        for data in (ROOT / PACKAGE).rglob(f"*.{suffix}"):
            assert f"{data.relative_to(ROOT)}" in names
    assert f"{PACKAGE}/native/_native.lib.so" in names


def test_wheel_is_for_any_python(wheel: Path, dist: Path) -> None:
    """And for glibc of 2018 and newer; auditwheel and twine have looked at it."""
    machine = os.uname().machine
    tag = f"py3-none-manylinux_2_28_{machine}"
    assert wheel.name == f"{PACKAGE}-{__version__}-{tag}.whl"
    log = " ".join((dist / "log").read_text().split())
    found = re.search(rf'platform tag: "manylinux_2_(\d+)_{machine}"', log)
    assert found is not None, log
    assert int(found[1]) <= 28
    assert log.count("PASSED") == 2


def test_sdist_contents(dist: Path) -> None:
    """The wheel was built from it; people read the rest."""
    (sdist,) = dist.glob("*.tar.gz")
    top = f"{PACKAGE}-{__version__}"
    assert sdist.name == f"{top}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = set(archive.getnames())
    assert {name.split("/")[0] for name in names} == {top}
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md"):
        assert f"{top}/{name}" in names
    sources = ROOT / PACKAGE / "native" / "csrc"
    for path in sources.iterdir():
        assert f"{top}/{path.relative_to(ROOT)}" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_one_version() -> None:
    """What cannot read it from the package says the same."""
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.M) == [__version__]
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## \[(.+?)\]", changes, re.M)[0] == __version__


def test_wheel_entry_points(installed: Path) -> None:
    parser = ConfigParser()
    parser.read(next(installed.glob("*.dist-info/entry_points.txt")))
    assert dict(parser["vllm.general_plugins"]) == {
        "attn_offload": f"{PACKAGE}.plugin:register"
    }
    assert parser["console_scripts"]["vllm-memory-node"] == (
        f"{PACKAGE}.cli:memory_node_main"
    )


def test_base_install_is_small(installed: Path) -> None:
    """vLLM, torch and Triton come with extras."""
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    fields = [line.partition(": ")[::2] for line in metadata.splitlines()]
    assert {text for name, text in fields if name == "Provides-Extra"} == EXTRAS
    requirements = [text for name, text in fields if name == "Requires-Dist"]
    base = {re.split(r"\W", each)[0] for each in requirements if "extra" not in each}
    assert base == {
        "numpy",
        "msgspec",
        "pydantic",
        "prometheus_client",
        "psutil",
        "rich",
    }


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
