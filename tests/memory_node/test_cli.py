# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-memory-node`` process: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from node_process import COMMAND, NodeProcess

from vllm_attn_offload.client.control_client import ControlClient

START = ("--kv-cache-gib", "0.1")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """Run a node that is expected to end by itself."""
    return subprocess.run(
        [COMMAND, *options], capture_output=True, text=True, timeout=30
    )


def test_sigterm_on_unix(start: Callable[..., NodeProcess], tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    node = start(f"unix:{path}")
    assert node.start_s < 20
    assert node.address == f"unix:{path}"
    client = ControlClient(node.address, 5)
    assert node.stop(signal.SIGTERM) == 0
    client.wait_until_lost()
    client.close()
    assert not path.exists()
    lines = node.log().splitlines()
    assert "ready on unix:" in lines[0]
    assert "device cpu" in lines[0]
    assert "0.10 GiB for KV blocks" in lines[0]
    assert "stopping" in lines[-1]


def test_sigint_on_tcp(start: Callable[..., NodeProcess]) -> None:
    """Port 0 picks a free one, and a node on TCP serves metrics on request."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        metrics_port = probe.getsockname()[1]
    node = start("127.0.0.1:0", "--metrics-port", str(metrics_port))
    host, port = node.address.split(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    client = ControlClient(node.address, 5)
    assert client.info.pid == node.process.pid
    client.close()
    name = f"{socket.gethostname()}:{port}"
    url = f"http://127.0.0.1:{metrics_port}/metrics"
    metrics = urllib.request.urlopen(url, timeout=5).read().decode()
    free = f'attn_offload:memory_node_kv_bytes_free{{node="{name}"}}'
    assert free in metrics
    for kind in ("minor", "major"):
        counter = f"attn_offload:memory_node_{kind}_page_faults_total"
        assert f'{counter}{{node="{name}"}}' in metrics
    assert node.stop(signal.SIGINT) == 0
    assert "Traceback" not in node.log()


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR"])
def test_default_address_is_for_one_user(variable: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "XDG_RUNTIME_DIR"}
    # A socket's path is short.
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        subprocess.Popen(
            [COMMAND, *START],
            env=environment | {variable: directory},
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stderr is not None
        announced = process.stderr.readline()
        (path,) = Path(directory).rglob("vllm-memory-node.sock")
        assert f"ready on unix:{path}:" in announced
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        if variable == "TMPDIR":
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        ControlClient(f"unix:{path}", 5).close()
        process.terminate()
        assert process.wait(30) == 0


def test_default_address_is_too_long(tmp_path: Path) -> None:
    ended = subprocess.run(
        [COMMAND, *START],
        env=os.environ | {"XDG_RUNTIME_DIR": f"{tmp_path}/{100 * 'x'}"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 2
    assert "Allowed: 1 to 107. Use a shorter path" in ended.stderr


def test_address_taken(node: NodeProcess) -> None:
    ended = run("--listen", node.address, *START)
    assert ended.returncode == 1
    assert f"cannot listen on {node.address}: Address already in use" in ended.stderr
    assert "Choose a free address with --listen" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert node.process.poll() is None


def test_metrics_port_taken(tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run("--listen", f"unix:{path}", "--metrics-port", port, *START)
    assert ended.returncode == 1
    assert f"cannot serve metrics on 127.0.0.1:{port}" in ended.stderr
    assert "Choose a free --metrics-port" in ended.stderr
    assert not path.exists()


def test_memory_short(tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    ended = run("--listen", f"unix:{path}", "--kv-cache-gib", "1e6")
    assert ended.returncode == 1
    assert "--kv-cache-gib 1e+06 is more than the" in ended.stderr
    assert "GiB of memory that are available. Lower it" in ended.stderr
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--listen", "nowhere"), "'nowhere' is not an address. Allowed: HOST:PORT"),
        (("--kv-cache-gib", "0"), "'0' is not a size. Allowed: a number above 0"),
        (("--kv-cache-gib", "nan"), "'nan' is not a size"),
        (("--cpus", "4096"), "'4096' is not a list of usable CPUs. Allowed here:"),
        (("--cpus", "a-b"), "'a-b' is not a list of usable CPUs. Allowed here:"),
        (("--cpus", "0,"), "'0,' is not a list of usable CPUs"),
        (("--cpus", "0,1-0"), "'0,1-0' is not a list of usable CPUs"),
        (("--cpus", "0-0-0"), "'0-0-0' is not a list of usable CPUs"),
        (("--cpus", "0-99999999999"), "'0-99999999999' is not a list of usable CPUs"),
        (("--device", "tpu"), "'tpu' is not a device"),
        (("--metrics-port", "99999"), "'99999' is not a port. Allowed: 0 to 65535"),
        (("--metrics-port", "-1"), "'-1' is not a port. Allowed: 0 to 65535"),
        (("--metrics-listen", "x..y:1"), "'x..y:1' names no host. Allowed: an IP"),
        (("--listen", f"{70 * 'a'}:1"), "aa:1' names no host. Allowed: an IP"),
    ],
)
def test_wrong_options(options: tuple[str, str], message: str) -> None:
    ended = run(*options)
    assert ended.returncode == 2
    assert message in ended.stderr
