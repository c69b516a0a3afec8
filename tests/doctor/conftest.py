# SPDX-License-Identifier: Apache-2.0
"""Findings of single checks in processes of their own, and nodes to look at."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from doctor_findings import Look
from doctor_nodes import OPTIONS, StartNode
from node_process import NodeProcess

from vllm_attn_offload.doctor.finding import Finding

_CHILD = """
import dataclasses, functools, json, sys
from importlib import import_module
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.check import in_background
from vllm_attn_offload.doctor.model_size import read_shape

module, function, options, model = json.loads(sys.argv[1])
check = getattr(import_module("vllm_attn_offload.doctor." + module), function)
arguments = []
if options is not None:
    shape = in_background(functools.partial(read_shape, model, ())) if model else None
    config = AttentionOffloadConfig.from_dict(options)
    arguments = [Case(config, options, model, shape=shape)]
print(json.dumps([dataclasses.asdict(each) for each in check(*arguments)]))
"""


@pytest.fixture(scope="session")
def look() -> Look:
    """``look("host_limits.check_descriptors", prefix=["prlimit", ...])``.

    ``options`` and ``model`` make the case that the check gets; None: it takes none.
    ``flags`` are Python's.
    """

    def run(
        name: str,
        options: dict[str, Any] | None = None,
        model: str = "",
        prefix: Sequence[str] = (),
        flags: Sequence[str] = (),
        **variables: str,
    ) -> list[Finding]:
        request = json.dumps([*name.split("."), options, model])
        child = subprocess.run(
            [*prefix, sys.executable, *flags, "-P", "-c", _CHILD, request],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert child.returncode == 0, child.stderr
        return [Finding(**each) for each in json.loads(child.stdout)]

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartNode]:
    """Starts nodes on loopback that end with the test."""
    with contextlib.ExitStack() as stack:

        def run(*options: str, listen: str = "127.0.0.1:0", **rest: str) -> NodeProcess:
            log = tmp_path / f"{time.monotonic_ns()}.log"
            node = NodeProcess(listen, log, *OPTIONS, *options, **rest)
            stack.callback(node.kill)
            return node

        yield run


@pytest.fixture(scope="session")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node in good health."""
    log = tmp_path_factory.mktemp("node") / "log"
    node = NodeProcess("127.0.0.1:0", log, *OPTIONS)
    yield node
    node.kill()
