# SPDX-License-Identifier: Apache-2.0
"""Nodes that listen at several addresses, and what they are called."""

from __future__ import annotations

import socket
import stat
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from node_process import COMMAND, NodeProcess, eventually

from vllm_attn_offload import __version__
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.node_identity import default_name, unix_path
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.trust import Credentials

START = ("--kv-cache-gib", "0.05")


def test_tcp_and_unix(start: Callable[..., NodeProcess], tmp_path: Path) -> None:
    path = tmp_path / "n.sock"
    node = start("127.0.0.1:0", "--listen", f"unix:{path}", "--listen", "[::1]:0")
    assert f"ready on {node.address}, unix:{path}, [::1]:" in node.log()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    port = node.address.rpartition(":")[2]
    with ExitStack() as stack:
        clients = [
            stack.enter_context(closing(ControlClient(address, 5)))
            for address in (node.address, f"unix:{path}")
        ]
        first, second = (client.info for client in clients)
        assert first == second
        assert first.name == f"{socket.gethostname()}:{port}"
        assert first.unix_path == str(path)
        assert first.version == __version__
        # Connections of all sockets count together.
        assert clients[0].stats().num_connections == 2
        assert clients[1].stats().uptime_s < 60
    with closing(ControlClient(node.address, 5)) as alone:
        assert eventually(lambda: alone.stats().num_connections == 1)
    assert node.stop() == 0
    assert not path.exists()


def test_instance_and_name(start: Callable[..., NodeProcess], tmp_path: Path) -> None:
    """A node that is started again is another instance under the same name."""
    instances = set()
    for _ in range(2):
        node = start(f"unix:{tmp_path / 'n.sock'}", "--name", "rack-1/node-0")
        with closing(ControlClient(node.address, 5)) as client:
            assert client.info.name == "rack-1/node-0"
            instances.add(client.info.instance)
        node.stop()
    assert len(instances) == 2


def test_name_of_any_socket(start: Callable[..., NodeProcess], tmp_path: Path) -> None:
    """Peers take printable ASCII only, and metrics no long names."""
    path = tmp_path / "n\u0153ud.sock"
    node = start(f"unix:{path}")
    with closing(ControlClient(node.address, 5)) as client:
        assert client.info.name == f"{socket.gethostname()}/n_ud"
        assert client.info.unix_path == str(path)
    node.stop()
    no_text = [Address(path="/tmp/n\udcff\n.sock")]
    assert default_name(no_text) == f"{socket.gethostname()}/n__"
    assert unix_path(no_text) == ""
    assert len(default_name([Address(path=f"/tmp/{200 * 'x'}")])) == 128


def test_nothing_is_left_where_one_address_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "n.sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = _run("--listen", f"unix:{path}", "--listen", address)
    assert ended.returncode == 1
    assert f"cannot listen on {address}: Address already in use" in ended.stderr
    assert not path.exists()


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        (("unix:/tmp/a", "0.0.0.0:0"), "--listen 0.0.0.0:0 serves other hosts"),
        (("127.0.0.1:0", "[::]:0"), "--listen [::]:0 serves other hosts"),
        (("unix:/tmp/a", "unix:/tmp/a"), "unix:/tmp/a was given more than once"),
    ],
)
def test_every_address_is_checked(listen: tuple[str, ...], message: str) -> None:
    ended = _run(*(part for each in listen for part in ("--listen", each)))
    assert ended.returncode == 2
    assert message in ended.stderr


def test_the_token_is_asked_for_on_both(
    start: Callable[..., NodeProcess], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("t" * 32)
    unix = f"unix:{tmp_path / 'n.sock'}"
    options = ("--listen", unix, "--auth-token-file", str(token))
    node = start("127.0.0.1:0", *options)
    for address in (node.address, unix):
        with pytest.raises(MemoryNodeError, match="it asks for a token"):
            ControlClient(address, 5)
        ControlClient(address, 5, Credentials(str(token))).close()


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *options, *START], capture_output=True, text=True, timeout=30
    )
