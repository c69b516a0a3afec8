# SPDX-License-Identifier: Apache-2.0
"""Imports run one way, and nothing of a memory node or the planner imports vLLM."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vllm_attn_offload"
#: Each folder may import those behind it.
LAYERS = ("engine", "worker", "attention", "client", "transport", "protocol", "native")
#: Importable from everywhere; the names are those of ``from vllm_attn_offload import``.
COMMON = {"__version__", "cpu_list", "errors", "logger", "printable", "versions"}
#: What else each folder or root module may import.
BESIDE: dict[str, set[str]] = {
    "engine": {
        "compatibility",
        "config",
        "memory_node.launcher",
        "metrics",
        "ray_nodes",
    },
    "ray_nodes": {"memory_node.launcher", "ray_options", "transport"},
    "worker": {"compatibility", "config", "plugin"},
    "attention": {"config"},
    "memory_node": {"transport", "protocol", "native", "metrics", "triton_kernels"},
    "planner": {
        "LLM",
        "trust_options",
        "worker",
        "client",
        "transport",
        "protocol",
        "memory_node",
    },
    "commands": {"doctor", "hooks", "planner", "ray_nodes", "status"},
    "doctor": {
        "client",
        "config",
        "engine",
        "hooks",
        "memory_node",
        "native",
        "patches",
        "planner",
        "protocol",
        "ray_nodes",
        "transport",
        "trust_options",
        "seconds_option",
    },
    "status": {"client", "protocol", "transport", "trust_options", "seconds_option"},
    "trust_options": {"transport"},
    "seconds_option": set(),
    "compatibility": {
        "unsupported",
        "unsupported_kv_dtype",
        "unsupported_models",
        "unsupported_parallel",
        "unsupported_speculative",
    },
    "unsupported_kv_dtype": {"unsupported"},
    "unsupported_models": {"config", "unsupported"},
    "unsupported_parallel": {"unsupported"},
    "unsupported_speculative": {"client", "unsupported"},
    "config": {"option_types", "ray_options", "transport"},
    "ray_options": {"config"},
    "metrics": {"protocol"},
    "patches": {"compatibility", "config", "engine"},
    "plugin": {"patches"},
    "llm": {"engine", "patches"},
    "cli": {"commands", "memory_node"},
    "__init__": {"config", "llm"},
}

IMPORT_ALL = """
import importlib, pathlib, sys
for name in {names!r}:
    module = importlib.import_module("vllm_attn_offload." + name)
    for directory in getattr(module, "__path__", []):
        for path in sorted(pathlib.Path(directory).rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            importlib.import_module(".".join((module.__name__, *parts)))
print(*sys.modules, sep="\\n")
"""


def modules_after_import(*names: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh process that imported all of ``names``."""
    process = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL.format(names=names)],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


def imports_of(path: Path) -> Iterator[str]:
    """Names of all imports, also in functions and under TYPE_CHECKING.

    Relative ones stay in their folder: ruff forbids those that start at a parent.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            if node.module == PACKAGE:
                yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def unit_files() -> dict[str, list[Path]]:
    """Modules of each folder, and each root module on its own."""
    package = ROOT / PACKAGE
    folders = [path for path in sorted(package.iterdir()) if path.is_dir()]
    folders += [ROOT / "patches", ROOT / "triton_kernels"]
    units = {folder.name: sorted(folder.rglob("*.py")) for folder in folders}
    return units | {path.stem: [path] for path in sorted(package.glob("*.py"))}


UNITS = unit_files()


@pytest.mark.parametrize("unit", UNITS)
def test_imports_run_one_way(unit: str) -> None:
    """In particular, only the engine imports the memory node, and only its launcher."""
    below = LAYERS[LAYERS.index(unit) + 1 :] if unit in LAYERS else ()
    allowed = {unit}
    if unit not in COMMON:
        allowed |= {*below, *COMMON, *BESIDE.get(unit, ())}
    for path in UNITS[unit]:
        for name in imports_of(path):
            package, _, module = name.partition(".")
            if package == PACKAGE:
                is_allowed = allowed & {module, module.split(".")[0]}
                assert is_allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_memory_node_side_imports_no_vllm() -> None:
    modules = modules_after_import(
        "memory_node",
        "transport",
        "client",
        "protocol",
        "config",
        "metrics",
        "planner",
        "ray_nodes",
        "doctor",
        "status",
        "commands",
        "triton_kernels",
    )
    assert "vllm_attn_offload.memory_node.main" in modules
    assert "vllm_attn_offload.client.remote_attention" in modules
    assert not {name for name in modules if name.split(".")[0] == "vllm"}


def test_compiled_kernel_needs_no_torch() -> None:
    """Importing it would take most of the start of a node."""
    modules = modules_after_import(
        "memory_node.main", "memory_node.decode_attention.cpp_attention"
    )
    assert "vllm_attn_offload.memory_node.server" in modules
    assert "vllm_attn_offload.native.attention" in modules
    assert not {"torch", "vllm"} & modules
