# SPDX-License-Identifier: Apache-2.0
"""Engines of the end-to-end tests: each is started once, because that costs most."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import workload
from harness.network_namespace import RemoteHost, remote_host
from harness.serve_process import ServeProcess
from node_process import NodeProcess

HERE = Path(__file__).parent
Result = dict[str, Any]
Once = Callable[[str, Callable[[Path], None]], Path]


@contextmanager
def poisoned_nodes(
    mode: workload.Mode, directory: Path, cpu: str
) -> Iterator[list[str]]:
    """Memory nodes whose unwritten blocks hold NaN, here or on a host of their own."""
    options = ["--kv-cache-gib", "1", "--cpus", cpu]
    host = RemoteHost("127.0.0.1", ())
    with ExitStack() as stack:
        if mode.is_remote:
            try:
                host = stack.enter_context(remote_host())
            except PermissionError as error:
                pytest.skip(str(error))
            workload.TOKEN_FILE.write_text("a secret of these tests, 32+ characters\n")
            workload.TOKEN_FILE.chmod(0o600)
            options += ["--auth-token-file", str(workload.TOKEN_FILE)]
        nodes = [
            NodeProcess(
                f"{host.address}:0",
                directory / f"node-{index}.log",
                *options,
                prefix=host.command,
                ATTN_OFFLOAD_POISON_KV="1",
            )
            for index in range(mode.num_nodes)
        ]
        for node in nodes:
            stack.callback(node.kill)
        yield [node.address for node in nodes]


@pytest.fixture(scope="session")
def generated(smollm2: str, once: Once, node_cpu: str) -> Callable[[str, str], Result]:
    """``generated(dtype, mode)``: the workload through ``LLM()``."""

    @functools.cache
    def run(dtype: str, mode: str) -> Result:
        directory = once(f"{mode}-{dtype}", functools.partial(generate, dtype, mode))
        return json.loads((directory / "result.json").read_text("utf-8"))

    def generate(dtype: str, mode: str, directory: Path) -> None:
        script, output = str(HERE / "generate.py"), directory / "result.json"
        command = [sys.executable, script, smollm2, dtype, mode, str(output)]
        options = workload.MODES[mode]
        with poisoned_nodes(options, directory, node_cpu) as addresses:
            engine = subprocess.run(
                [*command, *addresses],
                capture_output=True,
                text=True,
                timeout=900,
                env=os.environ | options.variables,
            )
        assert engine.returncode == 0, engine.stderr[-4000:] + engine.stdout[-8000:]

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
