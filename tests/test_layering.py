# SPDX-License-Identifier: Apache-2.0
"""What a memory node or the planner imports never imports vLLM."""

from __future__ import annotations

import subprocess
import sys

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


def test_memory_node_side_imports_no_vllm() -> None:
    modules = modules_after_import(
        "memory_node",
        "transport",
        "client",
        "protocol",
        "config",
        "metrics",
        "planner",
        "triton_kernels",
    )
    assert "vllm_attn_offload.memory_node.main" in modules
    assert "vllm_attn_offload.client.remote_attention" in modules
    assert not {name for name in modules if name.split(".")[0] == "vllm"}
