# SPDX-License-Identifier: Apache-2.0
"""Nodes to mistreat, a token, and certificates of an authority made for the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from busy_session import BusySession
from certificates import Authority
from node_process import NodeProcess, eventually, running_node

from vllm_attn_offload.client.control_client import ControlClient

OPTIONS = ("--kv-cache-gib", "0.25", "--cpus", str(max(os.sched_getaffinity(0))))
StartNode = Callable[..., NodeProcess]


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    """Starts nodes that end with the test."""
    nodes: list[NodeProcess] = []

    def start(listen: str, *options: str) -> NodeProcess:
        log = tmp_path / f"node{len(nodes)}.log"
        nodes.append(NodeProcess(listen, log, *OPTIONS, *options))
        return nodes[-1]

    yield start
    for node in nodes:
        node.kill()


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good token in a file that nobody else may read."""
    path = tmp_path_factory.mktemp("token") / "token"
    path.touch(mode=0o600)
    path.write_text("0123456789abcdef" * 4 + "\n")
    return path


@pytest.fixture(scope="session")
def other_token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token that no node knows."""
    path = tmp_path_factory.mktemp("other-token") / "token"
    path.touch(mode=0o600)
    path.write_text("f" * 64)
    return path


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The one that nodes and engines of a test trust."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node on loopback that trusts whoever reaches it."""
    yield from _shared_node(tmp_path_factory)


@pytest.fixture(scope="session")
def local_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node on a Unix socket, which shares memory with its workers."""
    directory = tmp_path_factory.mktemp("local")
    with running_node(directory, *OPTIONS) as process:
        yield process


@pytest.fixture
def unharmed(node: NodeProcess) -> Iterator[NodeProcess]:
    """The node, with a session beside the test that must get right outputs.

    After the test nothing is held, and no thread of the node ended in an error.
    """
    yield from _unharmed(node)


@pytest.fixture
def unharmed_local(local_node: NodeProcess) -> Iterator[NodeProcess]:
    """The same for the node on a Unix socket."""
    yield from _unharmed(local_node)


def _unharmed(node: NodeProcess) -> Iterator[NodeProcess]:
    before = node.log()
    neighbour = BusySession(node.address)
    yield node
    assert eventually(lambda: neighbour.num_steps > 3, 30)
    neighbour.stop()
    with closing(ControlClient(node.address, 20)) as client:
        total = client.info.kv_bytes_total
        assert eventually(lambda: client.refresh_info().kv_bytes_free == total, 20)
    _, found, trace = node.log().removeprefix(before).partition("Traceback")
    assert not found, trace[:4000]


@pytest.fixture(scope="session")
def node_with_token(
    tmp_path_factory: pytest.TempPathFactory, token_file: Path
) -> Iterator[NodeProcess]:
    """A node that asks for a token."""
    options = ("--auth-token-file", str(token_file))
    yield from _shared_node(tmp_path_factory, *options)


@pytest.fixture(scope="session")
def node_with_tls(
    tmp_path_factory: pytest.TempPathFactory, token_file: Path, authority: Authority
) -> Iterator[NodeProcess]:
    """A node that asks for a certificate and a token."""
    identity = authority.sign("node", "IP:127.0.0.1")
    options = (*identity.options, "--auth-token-file", str(token_file))
    yield from _shared_node(tmp_path_factory, *options)


def _shared_node(
    tmp_path_factory: pytest.TempPathFactory, *options: str
) -> Iterator[NodeProcess]:
    log = tmp_path_factory.mktemp("node") / "node.log"
    process = NodeProcess("127.0.0.1:0", log, *OPTIONS, *options)
    yield process
    process.kill()
