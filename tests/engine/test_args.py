# SPDX-License-Identifier: Apache-2.0
"""Engine arguments: where local memory nodes listen."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from vllm.utils.network_utils import get_open_zmq_ipc_path

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.engine.args import run_dir
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


def binds(address: str) -> bool:
    """Whether vLLM could open a socket there."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as sock:
        try:
            sock.bind(address)
        except zmq.ZMQError:
            return False
        return True


@pytest.mark.parametrize("variable", ["TMPDIR", "VLLM_RPC_BASE_PATH"])
def test_local_node_starts_wherever_vllm_does(
    variable: str, short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the longest directory that vLLM's own sockets fit in."""
    monkeypatch.delenv("ATTN_OFFLOAD_RUN_DIR", raising=False)
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    if variable != "TMPDIR":
        monkeypatch.setenv("TMPDIR", long_directory(short, 200))
    monkeypatch.setenv(variable, long_directory(short, LONGEST_BYTES + 1))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert not binds(get_open_zmq_ipc_path())

    monkeypatch.setenv(variable, longest := long_directory(short, LONGEST_BYTES))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert binds(get_open_zmq_ipc_path())
    directory = run_dir(data_parallel_index=999, node_index=99)
    assert directory.parent == Path(longest)
    node = MemoryNodeProcess(directory, kv_cache_gib=0.1, cpus="", startup_timeout_s=60)
    try:
        ControlClient(node.address, 5).close()
    finally:
        node.stop()
