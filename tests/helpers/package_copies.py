# SPDX-License-Identifier: Apache-2.0
"""Copies of this package, of vLLM and of site-packages that lack or change something.

They go onto ``PYTHONPATH`` of a process, in front of what is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_attn_offload"
_NESTED = ("patches", "triton_kernels")
_SITE = Path(sysconfig.get_path("purelib"))
_MAIN = f"import sys; from {PACKAGE}.cli import main; sys.exit(main())"


def copy_package(directory: Path, without: Sequence[str] = ()) -> Path:
    """Copy this package as a wheel would install it.

    Args:
        directory: Where; the folder is returned.
        without: Names of files that are left out.
    """
    ignore = shutil.ignore_patterns("csrc", "__pycache__", *without)
    shutil.copytree(ROOT / PACKAGE, directory / PACKAGE, ignore=ignore)
    for name in _NESTED:
        shutil.copytree(ROOT / name, directory / PACKAGE / name, ignore=ignore)
    return directory


def replace_in(path: Path, before: str, after: str) -> None:
    """Change a file, also a link to one, at one place."""
    source = path.read_text("utf-8")
    assert source.count(before) == 1
    path.unlink()
    path.write_text(source.replace(before, after), "utf-8")


def link_site_packages(directory: Path, without: Sequence[str]) -> Path:
    """Link what is installed, but for names that begin with one of ``without``."""
    for entry in _SITE.iterdir():
        if not entry.name.startswith(tuple(without)):
            (directory / entry.name).symlink_to(entry)
    return directory


def link_vllm(directory: Path, own: Path) -> Path:
    """Link the installed vLLM, with real folders on the way to a file to change.

    Args:
        directory: Gets a folder ``vllm``, which is returned.
        own: Of a file, relative to it.
    """
    target = directory / "vllm"
    for folder in (Path(), *reversed(own.parents[:-1])):
        (target / folder).mkdir()
        for entry in (_SITE / "vllm" / folder).iterdir():
            if folder / entry.name not in own.parents:
                (target / folder / entry.name).symlink_to(entry)
    return target


def run_command(
    *arguments: str,
    paths: Sequence[Path],
    prefix: Sequence[str | Path] = (),
    is_bare: bool = False,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``vllm-attn-offload`` of a copy.

    Args:
        *arguments: Of the command.
        paths: Searched for packages, first first.
        prefix: Put in front of the command.
        is_bare: Search nothing but ``paths``.
        **variables: Added to its environment.
    """
    bare = ["-S"] if is_bare else []
    return subprocess.run(
        [*prefix, sys.executable, *bare, "-P", "-c", _MAIN, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
