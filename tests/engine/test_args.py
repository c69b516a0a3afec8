# SPDX-License-Identifier: Apache-2.0
"""Engine arguments: where local memory nodes listen, and what an engine leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.engine.args import (
    START_METHOD_VARIABLE,
    environment_of_one_engine,
)
from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess

#: What remains of a socket's path beside "/" and the UUID of vLLM's own sockets.
LONGEST_BYTES = 107 - 1 - 36


@pytest.fixture
def short() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield directory


def long_directory(base: str, num_bytes: int) -> str:
    """Make a directory whose path has so many bytes."""
    path = Path(base) / ("x" * (num_bytes - len(base) - 1))
    path.mkdir()
    return str(path)


SCRIPT = """
import sys, zmq
from vllm.utils.network_utils import get_open_zmq_ipc_path
from vllm_attn_offload.engine.args import run_dir
with zmq.Context() as context, context.socket(zmq.PAIR) as sock:
    try:
        sock.bind(get_open_zmq_ipc_path())
    except zmq.ZMQError:
        sys.exit("vLLM has no socket there")
print(run_dir(data_parallel_index=999, node_index=99))
"""


def run_dir_with(**variables: str) -> str:
    """Where a process puts a node's socket; empty where vLLM itself has no socket."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ATTN_OFFLOAD_RUN_DIR", "VLLM_RPC_BASE_PATH")
    }
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        assert "vLLM has no socket there" in process.stderr
        return ""
    return process.stdout.splitlines()[-1]


@pytest.mark.parametrize("variable", ["TMPDIR", "VLLM_RPC_BASE_PATH"])
def test_local_node_starts_wherever_vllm_does(variable: str, short: str) -> None:
    """Also in the longest directory that vLLM's own sockets fit in."""
    temporary = long_directory(short, 200)
    too_long = long_directory(short, LONGEST_BYTES + 1)
    assert not run_dir_with(**{"TMPDIR": temporary, variable: too_long})

    longest = long_directory(short, LONGEST_BYTES)
    directory = Path(run_dir_with(**{"TMPDIR": temporary, variable: longest}))
    assert directory.parent == Path(longest)
    node = MemoryNodeProcess(directory, kv_cache_gib=0.1, cpus="", startup_timeout_s=60)
    try:
        ControlClient(node.address, 5).close()
    finally:
        node.stop()


@pytest.mark.parametrize("given", [None, "fork"])
def test_the_start_method_of_ray_does_not_outlive_the_start(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user set is there again, for stock vLLM in the same process."""
    monkeypatch.delenv(START_METHOD_VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(START_METHOD_VARIABLE, given)
    with environment_of_one_engine():
        os.environ[START_METHOD_VARIABLE] = "spawn"
    assert os.environ.get(START_METHOD_VARIABLE) == given
