# SPDX-License-Identifier: Apache-2.0
"""Engines of the end-to-end tests: each is started once, because that costs most."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Tests are imported by path (importlib mode); their helpers lie beside them.
sys.path.insert(0, str(HERE))

import workload  # noqa: E402
from serve import ServeProcess  # noqa: E402

Result = dict[str, Any]


@pytest.fixture(scope="session")
def generated(
    smollm2: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Result]:
    """``generated(dtype, "stock" | "offload")``: the workload through ``LLM()``."""
    directory = tmp_path_factory.mktemp("generated")

    @functools.cache
    def run(dtype: str, mode: str) -> Result:
        output = directory / f"{mode}-{dtype}.json"
        command = [sys.executable, HERE / "generate.py", smollm2, dtype, mode, output]
        engine = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=900
        )
        assert engine.returncode == 0, engine.stderr[-4000:] + engine.stdout[-8000:]
        return json.loads(output.read_text("utf-8"))

    return run


@pytest.fixture(scope="module")
def server(
    smollm2: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ServeProcess]]:
    """``server(dtype)``: a server with offloaded attention; ended with the module."""
    started: list[ServeProcess] = []
    directory = tmp_path_factory.mktemp("serve")

    @functools.cache
    def start(dtype: str) -> ServeProcess:
        options = workload.ENGINE_OPTIONS
        process = ServeProcess(
            smollm2,
            directory / f"{dtype}.log",
            *("--attention-offload", "--enforce-eager", "--dtype", dtype),
            *("--attention-offload-config.kv_cache_gib", f"{workload.SERVE_KV_GIB}"),
            *("--gpu-memory-utilization", f"{workload.SERVE_MEMORY_UTILIZATION}"),
            *("--max-model-len", str(options["max_model_len"])),
            *("--max-num-batched-tokens", str(options["max_num_batched_tokens"])),
            *("--max-num-seqs", str(options["max_num_seqs"])),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill_all()
