# SPDX-License-Identifier: Apache-2.0
"""What systemd is told: sd_notify(3) over a real datagram socket."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_process import NodeProcess

from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess
from vllm_attn_offload.memory_node.service_manager import ServiceManager

START = ("--kv-cache-gib", "0.05")


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket, and its name in the environment."""
    name = str(tmp_path / "notify")
    if request.param == "abstract":
        name = f"@attn-offload-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1))
        sock.settimeout(20)
        yield sock, name


def test_a_service(manager: tuple[socket.socket, str], tmp_path: Path) -> None:
    """Ready, then alive every half period, then stopping."""
    sock, name = manager
    node = NodeProcess(
        f"unix:{tmp_path / 'node.sock'}",
        tmp_path / "node.log",
        *START,
        NOTIFY_SOCKET=name,
        WATCHDOG_USEC="400000",
    )
    try:
        ready = sock.recv(4096).decode().splitlines()
        assert ready[0] == "READY=1"
        assert ready[1] == f"STATUS=Serving engines on {node.address}."
        assert [sock.recv(4096) for _ in range(3)] == 3 * [b"WATCHDOG=1"]
        node.process.terminate()
        said = b"WATCHDOG=1"
        while said == b"WATCHDOG=1":
            said = sock.recv(4096)
        assert said.startswith(b"STOPPING=1\nSTATUS=")
        assert node.process.wait(20) == 0
    finally:
        node.kill()


def test_progress(manager: tuple[socket.socket, str]) -> None:
    """A long start asks for more time."""
    sock, name = manager
    ServiceManager({"NOTIFY_SOCKET": name}).notify(STATUS="a", EXTEND_TIMEOUT_USEC="1")
    assert sock.recv(4096) == b"STATUS=a\nEXTEND_TIMEOUT_USEC=1"


def test_watchdog(manager: tuple[socket.socket, str]) -> None:
    """It starves where nobody accepts connections, and is not that of another."""
    sock, name = manager
    environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000"}
    alive = iter([True, True, False])
    stop = threading.Event()
    ServiceManager(environment).watch(lambda: next(alive, False), stop)
    assert [sock.recv(99) for _ in range(2)] == 2 * [b"WATCHDOG=1"]
    others = environment | {"WATCHDOG_PID": str(os.getppid())}
    ServiceManager(others).watch(lambda: True, stop)
    sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        sock.recv(99)


def test_a_manager_that_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).notify(READY="1")
    assert re.search("the service manager was not told READY=1: .*No such", caplog.text)


def test_a_child_is_no_service(
    manager: tuple[socket.socket, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that an engine starts leaves its service's socket alone."""
    sock, name = manager
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    node = MemoryNodeProcess(
        tmp_path / "run", kv_cache_gib=0.05, cpus="", startup_timeout_s=60
    )
    node.stop()
    sock.settimeout(0)
    with pytest.raises(BlockingIOError):
        sock.recv(99)
