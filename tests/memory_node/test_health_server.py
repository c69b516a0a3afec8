# SPDX-License-Identifier: Apache-2.0
"""``/metrics``, ``/healthz`` and ``/readyz`` of real nodes."""

from __future__ import annotations

import logging
import re
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from node_process import COMMAND, NodeProcess, eventually
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from vllm_attn_offload.memory_node.connections import strangers
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


class Scripted(Collector):
    """Runs something for every rendering, and counts them."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self._act = act
        self.num_collected = 0

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        self.num_collected += 1
        self._act()
        return iter(())


def server_of(collector: Scripted) -> tuple[str, int]:
    """Host and port of a server whose metrics are such."""
    registry = CollectorRegistry()
    registry.register(collector)
    address = HealthServer(Address("127.0.0.1", 0), registry).address
    return address.host, address.port


def test_many_readers_cost_no_more_than_one() -> None:
    collector = Scripted(lambda: time.sleep(0.05))
    host, port = server_of(collector)
    started = time.monotonic()

    def read(_: int) -> int:
        return httpx.get(f"http://{host}:{port}/metrics", timeout=30).status_code

    with ThreadPoolExecutor(8) as readers:
        assert set(readers.map(read, range(40))) == {200}
    assert collector.num_collected <= 1 + (time.monotonic() - started) / 0.5
    before = collector.num_collected
    time.sleep(0.5)
    read(0)
    assert collector.num_collected == before + 1


def test_threads_are_bounded() -> None:
    """Also while the metrics that clients ask for, and do not wait for, are late."""
    release = threading.Event()
    host, port = server_of(Scripted(lambda: release.wait(30)))
    before = threading.active_count()
    with ExitStack() as stack:
        stack.callback(release.set)
        for _ in range(80):
            sock = stack.enter_context(socket.create_connection((host, port), 5))
            sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert eventually(lambda: threading.active_count() >= before + 32)
        time.sleep(0.2)
        assert threading.active_count() <= before + 32
    assert httpx.get(f"http://{host}:{port}/healthz", timeout=10).status_code == 200


def test_no_descriptors_are_left(caplog: pytest.LogCaptureFixture) -> None:
    """The server waits for one without using the CPU, and says so once."""
    host, port = server_of(Scripted())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket())
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, hard))
        fill_descriptors(stack)
        sock.connect((host, port))
        sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        used = time.process_time()
        time.sleep(1)
        assert time.process_time() - used < 0.3
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        sock.settimeout(5)
        assert sock.recv(1024).startswith(b"HTTP/1.0 200 ")
    assert caplog.text.count("cannot answer probes for now") == 1


def fill_descriptors(stack: ExitStack) -> None:
    """Open sockets until no more are allowed."""
    while True:
        try:
            stack.enter_context(socket.socket())
        except OSError:
            return


def test_no_threads_are_left(caplog: pytest.LogCaptureFixture) -> None:
    """Clients are let go, and the server goes on; it says so once."""
    host, port = server_of(Scripted())
    threading.stack_size(1 << 46)  # more than a process can map
    try:
        for _ in range(3):
            with socket.create_connection((host, port), 5) as sock:
                assert sock.recv(1) == b""
    finally:
        threading.stack_size(0)
    assert httpx.get(f"http://{host}:{port}/healthz", timeout=5).status_code == 200
    assert caplog.text.count("cannot answer probes for now") == 1
    assert "Traceback" not in caplog.text


def test_errors_are_lines_about_strangers(caplog: pytest.LogCaptureFixture) -> None:
    """The number of those that are written is limited, unless they are errors."""

    def fail() -> None:
        raise ValueError("a defect")

    host, port = server_of(Scripted(fail))
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://{host}:{port}/metrics", timeout=5)
    assert eventually(lambda: "a defect" in caplog.text)
    (record,) = caplog.records
    assert (record.name, record.levelno) == (strangers.name, logging.WARNING)


def test_alive_while_it_touches_memory(tmp_path: Path) -> None:
    """Probes are answered before the node is ready, and told so."""
    log = tmp_path / "node.log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listen = ("--listen", f"unix:{tmp_path / 'node.sock'}")
    options = ("--kv-cache-gib", "1", "--preallocate", "--metrics-port", str(port))
    with log.open("wb") as sink:
        process = subprocess.Popen([COMMAND, *listen, *options], stderr=sink)
    told = set()
    try:
        # The client is made first: it takes longer than a fast host for a GiB.
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:

            def is_ready() -> bool:
                try:
                    ready, alive = client.get("/readyz"), client.get("/healthz")
                except httpx.ConnectError:
                    return False
                assert alive.status_code == 200
                told.add((ready.status_code, ready.text))
                return ready.status_code == 200

            assert eventually(is_ready, 60)
        assert told == {(503, "starting\n"), (200, "serving\n")}
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
