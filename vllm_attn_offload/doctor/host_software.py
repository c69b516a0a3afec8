# SPDX-License-Identifier: Apache-2.0
"""Software of this host: versions, and whether vLLM finds the plugin."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

from vllm_attn_offload import __version__
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.ray_nodes.cluster import check_installed

_PLUGIN = "attn_offload"
_GROUP = "vllm.general_plugins"
_BESIDE = ("torch", "triton", "ray")
_PYTHON = ((3, 11), (3, 13))


def check_versions(case: Case) -> Iterator[Finding]:
    """Name what is installed; vLLM's own version is looked at with its hooks."""
    found = [f"vllm-attn-offload {__version__}", f"Python {platform.python_version()}"]
    found += [f"{name} {number}" for name in _BESIDE if (number := _version(name))]
    if not case.is_engine_host:
        found.append("no vLLM: this host can run memory nodes, no engines")
    yield Finding.ok("versions", ", ".join(found))
    first, end = _PYTHON
    if not first <= sys.version_info[:2] < end:
        yield Finding.warn(
            "versions",
            f"Python {platform.python_version()} was never tried",
            f"Python {first[0]}.{first[1]} up to {end[0]}.{end[1] - 1}",
            "Make a virtual environment of one of these.",
        )
    if case.config.memory_nodes and not case.config.addresses:
        try:
            check_installed()
        except ImportError as error:
            yield Finding.of_error("Ray", error, "Ray beside vLLM")


def check_plugin() -> Iterator[Finding]:
    """Look for the entry point by which vLLM finds this package."""
    names = {each.name for each in entry_points(group=_GROUP)}
    allowed = os.environ.get("VLLM_PLUGINS")
    if _PLUGIN not in names:
        yield Finding.fail(
            "plugin",
            f"no installed package names {_PLUGIN} to vLLM: this one lies in "
            "sys.path without its metadata",
            f"an entry point {_PLUGIN} in {_GROUP}",
            "Install it: pip install vllm-attn-offload, or in a checkout pip install "
            "-e .",
        )
    elif allowed is not None and _PLUGIN not in allowed.split(","):
        yield Finding.fail(
            "plugin",
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading {_PLUGIN}",
            f"VLLM_PLUGINS unset, or {_PLUGIN} in its list",
            f"Unset it, or run: export VLLM_PLUGINS={allowed and allowed + ','}"
            f"{_PLUGIN}",
        )
    else:
        yield Finding.ok("plugin", f"vLLM loads {_PLUGIN}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
