# SPDX-License-Identifier: Apache-2.0
"""Signatures of what this package uses of one version of vLLM."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from vllm_attn_offload.hooks.signature import ABSENT, signature
from vllm_attn_offload.hooks.source_tree import SourceTree
from vllm_attn_offload.hooks.used_names import OWN, THEIRS, Use, used_names

_DIRECTORY = Path(__file__).parent
_TITLE = "# Of vLLM {}; written by `vllm-attn-offload hooks --write`.\n"
_SEPARATOR = "  "
#: Of this package, installed or in a checkout.
_PARTS = (OWN, f"{OWN}.patches")


@dataclass(frozen=True)
class Difference:
    """A hook that two versions of vLLM describe differently."""

    name: str
    before: str
    now: str
    use: Use


@dataclass(frozen=True)
class HookTable:
    """``signatures`` by dotted name; ``uses`` where they were read from source."""

    version: str
    signatures: dict[str, str]
    uses: dict[str, Use]

    @classmethod
    def of_source(cls, directory: Path | None = None) -> HookTable:
        """Read the installed vLLM, which is not imported, or another one.

        Args:
            directory: Of a package ``vllm``; None: the installed one.

        Raises:
            ValueError: There is no vLLM.
        """
        theirs = directory or _package(THEIRS)
        if theirs is None or not (theirs / "_version.py").is_file():
            raise ValueError(
                f"{directory or 'The Python environment'} holds no vLLM. Give the "
                "directory of an installed or unpacked package 'vllm' (it holds "
                "_version.py), or install vLLM."
            )
        found = {name: _package(name) for name in _PARTS}
        ours = {name: path for name, path in found.items() if path is not None}
        tree = SourceTree({THEIRS: theirs, **ours})
        uses = used_names(tree)
        signatures = {
            name: signature(tree, name, is_called="called" in use.how)
            for name, use in sorted(uses.items())
        }
        return cls(_version(theirs), signatures, uses)

    @classmethod
    def of_release(cls, release: str) -> HookTable:
        """Read the table that was written for a release, such as "0.32".

        Raises:
            ValueError: There is none.
        """
        if release not in (known := known_releases()):
            raise ValueError(
                f"There is no table of hooks for vLLM {release}. Allowed: "
                f"{', '.join(known)}. Name one of them."
            )
        title, *lines = _path(release).read_text("utf-8").splitlines()
        pairs = (line.partition(_SEPARATOR) for line in lines)
        version = title.split("vLLM ")[1].split(";")[0]
        return cls(version, {name: text for name, _, text in pairs}, {})

    @property
    def release(self) -> str:
        """Major and minor version."""
        return ".".join(self.version.split(".")[:2])

    def write(self) -> Path:
        """Write the table of this release, in place of an earlier one."""
        path = _path(self.release)
        lines = (f"{name}{_SEPARATOR}{it}\n" for name, it in self.signatures.items())
        path.write_text(_TITLE.format(self.version) + "".join(lines), "utf-8")
        return path

    def differences(self, before: HookTable) -> list[Difference]:
        """Compare with an earlier table; what only one of them has is absent."""
        names = sorted({*self.signatures, *before.signatures})
        changes = (
            Difference(
                name,
                before.signatures.get(name, ABSENT),
                self.signatures.get(name, ABSENT),
                self.uses.get(name, Use()),
            )
            for name in names
        )
        return [each for each in changes if each.before != each.now]


def known_releases() -> list[str]:
    """Releases with a table, oldest first."""
    releases = [path.stem.removeprefix("vllm-") for path in _DIRECTORY.glob("*.txt")]
    return sorted(releases, key=lambda each: list(map(int, each.split("."))))


def _path(release: str) -> Path:
    return _DIRECTORY / f"vllm-{release}.txt"


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    places = spec and spec.submodule_search_locations
    return Path(next(iter(places))) if places else None


def _version(package: Path) -> str:
    text = (package / "_version.py").read_text("utf-8")
    found = re.search(r"^__version__ = .*'([^']+)'$", text, re.M)
    return found[1] if found else "unknown"
