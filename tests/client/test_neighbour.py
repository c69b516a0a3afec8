# SPDX-License-Identifier: Apache-2.0
"""Which of a node's sockets a worker of the same host ends with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from harness.network_namespace import RemoteHost, remote_host
from node_process import NodeProcess, eventually
from raw_session import attach_request, make_geometry, reservation, session_of

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.neighbour import connect_nearest
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.transport.trust import NO_CREDENTIALS

OPTIONS = ("--kv-cache-gib", "0.05", "--cpus", str(max(os.sched_getaffinity(0))))
FAMILY = """
import sys
from vllm_attn_offload.client.neighbour import connect_nearest
from vllm_attn_offload.transport.trust import NO_CREDENTIALS
print(connect_nearest(sys.argv[1], 5, NO_CREDENTIALS).family.name)
"""


def start(directory: Path, listen: str = "127.0.0.1:0", *options: str) -> NodeProcess:
    unix = ("--listen", f"unix:{directory / 'node.sock'}")
    log = directory / "node.log"
    return NodeProcess(listen, log, *unix, *OPTIONS, *options)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    process = start(tmp_path)
    yield process
    process.kill()


@pytest.fixture
def host() -> Iterator[RemoteHost]:
    try:
        with remote_host() as made:
            yield made
    except PermissionError as error:
        pytest.skip(str(error))


def family(address: str) -> socket.AddressFamily:
    with connect_nearest(address, 5, NO_CREDENTIALS) as sock:
        return socket.AddressFamily(sock.family)


def test_a_worker_of_the_host_shares_memory(node: NodeProcess) -> None:
    """Though it was told the TCP address, which its engine keeps using."""
    geometry = make_geometry()
    with ExitStack() as stack:
        control = stack.enter_context(closing(ControlClient(node.address, 5)))
        reserved = control.reserve(reservation(geometry, 8 << 20))
        opened = control.open_session(session_of(reserved.reservation, 4))
        assert [each.transport for each in control.stats().sessions] == [""]
        attach = attach_request(opened, geometry)
        client = NodeClient(node.address, attach, 5)
        stack.callback(client.close)
        assert client.transport_name == "shared memory"
        # The node answers before it serves.
        assert eventually(
            lambda: control.stats().sessions[0].transport == "shared memory"
        )
        assert control.stats().sessions[0].worker_cpu_ids


def test_the_path_leads_elsewhere(
    node: NodeProcess, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Another node's socket lies there, then a file that is none, then nothing."""
    path = tmp_path / "node.sock"
    assert family(node.address) is socket.AF_UNIX
    other = start(tmp_path_factory.mktemp("other"))
    try:
        with closing(ControlClient(other.address, 5)) as client:
            os.replace(client.info.unix_path, path)
        assert family(node.address) is socket.AF_INET
        assert family(other.address) is socket.AF_INET
    finally:
        other.kill()
    path.unlink(missing_ok=True)
    path.write_text("no socket")
    assert family(node.address) is socket.AF_INET
    path.unlink()
    assert family(node.address) is socket.AF_INET


def test_directory_that_others_write_to(node: NodeProcess, tmp_path: Path) -> None:
    """Whoever could put a socket of theirs there is not trusted."""
    tmp_path.chmod(0o777)
    assert family(node.address) is socket.AF_INET
    tmp_path.chmod(0o700)
    assert family(node.address) is socket.AF_UNIX


def test_node_without_a_unix_socket(mortal_node: NodeProcess) -> None:
    assert family(mortal_node.address) is socket.AF_INET


def test_containers(host: RemoteHost, tmp_path: Path) -> None:
    """A network of one's own is no obstacle; not to have the directory is one."""
    node = start(tmp_path, f"{host.address.rpartition('.')[0]}.1:0", "--insecure")
    try:
        command = [sys.executable, "-c", FAMILY, node.address]
        assert _output([*host.command, *command]) == "AF_UNIX"
        hidden = f'mount -t tmpfs none "{tmp_path}" && exec "$@"'
        apart = [*host.command, "unshare", "--mount", "sh", "-c", hidden, "sh"]
        assert _output([*apart, *command]) == "AF_INET"
    finally:
        node.kill()


def _output(command: list[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()
