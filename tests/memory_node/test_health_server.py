# SPDX-License-Identifier: Apache-2.0
"""``/metrics``, ``/healthz`` and ``/readyz`` of real nodes."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from node_process import COMMAND, NodeProcess, eventually
from prometheus_client import CollectorRegistry

from vllm_attn_offload.memory_node.health_server import HealthServer
from vllm_attn_offload.memory_node.node_state import NodeState
from vllm_attn_offload.transport.address import Address

START = ("--kv-cache-gib", "0.05", "--name", "n-0")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., NodeProcess]]:
    nodes: list[NodeProcess] = []

    def start_node(*options: str) -> NodeProcess:
        listen = f"unix:{tmp_path / 'node.sock'}"
        nodes.append(NodeProcess(listen, tmp_path / "node.log", *START, *options))
        return nodes[-1]

    yield start_node
    for node in nodes:
        node.kill()


def url_of(log: str) -> str:
    found = re.search(r"metrics and health on (http://\S+)", log)
    assert found, log
    return found[1]


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "localhost:0"])
def test_three_paths(start: Callable[..., NodeProcess], listen: str) -> None:
    node = start("--metrics-listen", listen)
    with httpx.Client(base_url=url_of(node.log()), timeout=5) as client:
        ready = client.get("/readyz?verbose")
        assert (ready.status_code, ready.text) == (200, "serving\n")
        assert client.get("/healthz").status_code == 200
        metrics = client.get("/metrics")
        assert 'attn_offload:memory_node_state{node="n-0",state="serving"} 1.0' in (
            metrics.text
        )
        assert "process_resident_memory_bytes" in metrics.text
        assert metrics.headers["content-type"].startswith("text/plain; version=")
        head = client.head("/metrics")
        assert (head.status_code, head.text) == (200, "")
        for path in ("/", "/metrics/", "/../etc/passwd", "//metrics"):
            assert client.get(path).status_code == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert client.request(method, "/metrics").status_code == 501
    assert "Traceback" not in node.log()


def test_slow_clients_keep_nobody_out(start: Callable[..., NodeProcess]) -> None:
    """However many hang in the middle of a request, probes are answered at once."""
    node = start("--metrics-listen", "127.0.0.1:0")
    url = url_of(node.log())
    host, _, port = url.removeprefix("http://").rpartition(":")
    with ExitStack() as stack:
        hanging = []
        for _ in range(64):
            sock = socket.create_connection((host, int(port)), 5)
            hanging.append(stack.enter_context(sock))
            sock.sendall(b"GET /met")
        assert httpx.get(f"{url}/healthz", timeout=2).status_code == 200
        hanging[0].settimeout(5)
        assert hanging[0].recv(1) == b""
        hanging[-1].settimeout(10)
        assert hanging[-1].recv(1) == b""  # its pause was too long
    assert "Traceback" not in node.log()


def test_states() -> None:
    server = HealthServer(Address("127.0.0.1", 0), CollectorRegistry())
    url = f"http://{server.address}/readyz"
    assert httpx.get(url).status_code == 503
    for state, status in (
        (NodeState.STARTING, 503),
        (NodeState.SERVING, 200),
        (NodeState.STOPPING, 503),
    ):
        server.read_state = lambda state=state: state
        answer = httpx.get(url)
        assert (answer.status_code, answer.text) == (status, f"{state.value}\n")


def test_alive_while_it_touches_memory(tmp_path: Path) -> None:
    """For a GiB, probes are answered before the node is ready, and told so."""
    log = tmp_path / "node.log"
    listen = f"unix:{tmp_path / 'node.sock'}"
    options = ("--kv-cache-gib", "1", "--preallocate", "--metrics-port", "0")
    with log.open("wb") as sink:
        process = subprocess.Popen([COMMAND, "--listen", listen, *options], stderr=sink)
    try:
        assert eventually(lambda: "metrics and health on" in log.read_text(), 20)
        url = url_of(log.read_text())
        assert httpx.get(f"{url}/healthz", timeout=5).status_code == 200
        ready = httpx.get(f"{url}/readyz", timeout=5)
        if "ready on" not in log.read_text():
            assert (ready.status_code, ready.text) == (503, "starting\n")
        assert eventually(
            lambda: httpx.get(f"{url}/readyz", timeout=5).status_code == 200, 60
        )
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_address_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        listen = ("--listen", f"unix:{tmp_path / 'node.sock'}")
        ended = _run(*listen, "--metrics-listen", address, *START)
    assert ended.returncode == 1
    assert f"cannot serve metrics on {address}" in ended.stderr
    assert "Choose a free --metrics-listen, or leave it out." in ended.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics-listen", "unix:/tmp/m"), "Allowed: HOST:PORT or [IPV6]:PORT."),
        (("--metrics-listen", "9600"), "'9600' is not an address."),
        (
            ("--metrics-listen", "127.0.0.1:1", "--metrics-port", "2"),
            "both --metrics-listen and --metrics-port were given.",
        ),
        (("--name", "a\nb"), "Allowed: 1 to 128 printable ASCII characters."),
        (("--name", ""), "Allowed: 1 to 128 printable ASCII characters."),
    ],
)
def test_options(options: tuple[str, ...], message: str) -> None:
    ended = _run(*options, *START[:2])
    assert ended.returncode == 2
    assert message in ended.stderr


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *options], capture_output=True, text=True, timeout=30
    )
