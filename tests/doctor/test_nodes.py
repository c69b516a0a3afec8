# SPDX-License-Identifier: Apache-2.0
"""Findings about memory nodes, each with a real node that has the defect."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from doctor_findings import one
from doctor_nodes import MODEL, StartNode, look_at
from node_process import NodeProcess
from package_copies import copy_package, replace_in
from raw_session import make_geometry, reservation

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.transport.address import Address


def test_good_node(shared_node: NodeProcess) -> None:
    findings = look_at(shared_node.address, MODEL)
    assert "kernel " in one(findings, "connection", "ok").found
    assert "the median of 100" in one(findings, "round trip", "ok").found
    room = one(findings, "capacity", "ok").found
    assert "2,048 tokens of llama-3-8b in 16 bit" in room


def test_closed_port() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    finding = one(look_at(f"127.0.0.1:{port}"), "connection")
    assert "Connection refused" in finding.found
    assert "vllm-memory-node" in finding.do


def test_unknown_name() -> None:
    finding = one(look_at("nobody.invalid:7600"), "name")
    assert "nobody.invalid has no address" in finding.found


def test_silent_node(start: StartNode) -> None:
    """It is stopped: its connections are still accepted."""
    node = start()
    node.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    finding = one(look_at(node.address), "connection")
    assert "no answer to Hello within 1 s" in finding.found
    assert time.monotonic() - began < 5


def test_other_versions(start: StartNode, tmp_path: Path) -> None:
    """One speaks another protocol, one is another release that speaks ours."""
    other, newer = (
        copy_package(tmp_path / name) / "vllm_attn_offload"
        for name in ("other", "newer")
    )
    last = "\n)\nPROTOCOL_VERSION"
    replace_in(
        other / "protocol" / "messages.py", last, f'\n    (99, "of a test"),{last}'
    )
    replace_in(newer / "__init__.py", '__version__ = "', '__version__ = "7')
    finding = one(look_at(start(PYTHONPATH=str(other.parent)).address), "version")
    assert "does not match version 99 of this memory node" in finding.found
    assert "the same vllm-attn-offload release" in finding.do
    findings = look_at(start(PYTHONPATH=str(newer.parent)).address)
    assert "vllm-attn-offload 7" in one(findings, "version", "warn").found


def test_full_node(shared_node: NodeProcess) -> None:
    with closing(ControlClient(shared_node.address, 5)) as engine:
        free = engine.info.kv_bytes_free
        engine.reserve(reservation(make_geometry(), free))
        finding = one(look_at(shared_node.address, MODEL), "capacity")
        assert "0 tokens of llama-3-8b" in finding.found
        wanted = look_at(shared_node.address, kv_cache_gib=0.1)
        assert one(wanted, "capacity").allowed.startswith("0.10 GiB")


def test_shared_memory(start: StartNode, tmp_path: Path) -> None:
    """A second socket of the node is found; one that is not there is named."""
    place = f"unix:{tmp_path}/own.sock"
    node = start("--listen", place)
    for address in (place, node.address):
        found = one(look_at(address), "shared memory", "ok").found
        assert f"found by {place}" in found
    (tmp_path / "own.sock").rename(tmp_path / "away.sock")
    hint = one(look_at(node.address), "shared memory", "warn")
    assert f"at {place} cannot connect" in hint.found
    other = start(listen=place)
    hint = one(look_at(node.address), "shared memory", "warn")
    assert f"at {place} is another node" in hint.found
    other.kill()


def test_shared_memory_is_not_offered(shared_node: NodeProcess) -> None:
    hint = one(look_at(shared_node.address), "shared memory", "warn")
    assert "a second --listen" in hint.do


def test_slow_network(shared_node: NodeProcess) -> None:
    """Whatever the node sends arrives 2 ms late."""
    node = Address.parse(shared_node.address)
    with slow_relay(node.port) as port:
        finding = one(look_at(f"127.0.0.1:{port}", MODEL), "round trip", "warn")
    assert "a step of 32 layers waits for 32 of them" in finding.found


@contextlib.contextmanager
def slow_relay(port: int) -> Iterator[int]:
    """Port of loopback that is relayed to another one."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        contextlib.ExitStack() as stack,
    ):

        def accept() -> None:
            near, _ = server.accept()
            far = socket.create_connection(("127.0.0.1", port))
            for sock in (near, far):
                stack.callback(sock.close)
            for ends in ((near, far, 0.0), (far, near, 2e-3)):
                threading.Thread(target=relay, args=ends, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]


def relay(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            time.sleep(delay_s)
            target.sendall(data)


def test_node_that_attends_with_torch(start: StartNode) -> None:
    node = start("--attention-kernel", "torch")
    finding = one(look_at(node.address), "kernel", "warn")
    assert "attends with torch" in finding.found
