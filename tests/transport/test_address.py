# SPDX-License-Identifier: Apache-2.0
"""Addresses as users write them, and real sockets on them."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from vllm_attn_offload.transport.address import Address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7600", Address(host="127.0.0.1", port=7600)),
        ("node-3.example:0", Address(host="node-3.example", port=0)),
        ("[::1]:65535", Address(host="::1", port=65535)),
        ("unix:/run/node.sock", Address(path="/run/node.sock")),
    ],
)
def test_parse_round_trip(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["", "7600", "host", "host:", ":7600", "host:65536", "host:-1", "::1", "::1:7600"],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an address\. Allowed: .*Write for"):
        Address.parse(text)


@pytest.mark.parametrize("host", [70 * "a", "x..y", ".", "a\0b", "\udcff"])
def test_parse_refuses_what_no_resolver_takes(host: str) -> None:
    with pytest.raises(ValueError, match=r"names no host\. Allowed: an IP .*Write for"):
        Address.parse(f"{host}:7600")


def test_parse_refuses_abstract_sockets() -> None:
    with pytest.raises(ValueError, match=r"a null character\. Allowed: .*Use another"):
        Address.parse("unix:\0node")


@pytest.mark.parametrize("path", ["", "/tmp/" + 103 * "x"])
def test_parse_refuses_path_length(path: str) -> None:
    with pytest.raises(ValueError, match=r"Allowed: 1 to 107\. Use a shorter path"):
        Address.parse(f"unix:{path}")


@pytest.mark.parametrize(
    ("text", "is_local"),
    [
        ("127.8.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/a", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("node-3.example:1", False),
    ],
)
def test_is_local(text: str, is_local: bool) -> None:
    assert Address.parse(text).is_local is is_local


def exchange(listener: socket.socket, address: Address) -> bytes:
    """One message from a client to an accepted connection."""
    client = address.connect(timeout_s=5)
    accepted, _ = listener.accept()
    with listener, client, accepted:
        client.sendall(b"hello")
        return accepted.recv(5, socket.MSG_WAITALL)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_listen_tcp(host: str) -> None:
    try:
        listener = Address(host=host).listen()
    except OSError as error:
        pytest.skip(f"this host has no {host}: {error}")
    port = listener.getsockname()[1]
    assert port > 0
    assert exchange(listener, Address(host=host, port=port)) == b"hello"


def test_connect_tcp_has_no_delay() -> None:
    with Address(host="127.0.0.1").listen() as listener:
        address = Address(host="127.0.0.1", port=listener.getsockname()[1])
        with address.connect(timeout_s=5) as client:
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_listen_unix_is_private(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "node.sock"))
    before = os.umask(0o022)
    os.umask(before)
    listener = address.listen()
    assert stat.S_IMODE(os.stat(address.path).st_mode) == 0o600
    assert os.umask(before) == before
    assert exchange(listener, address) == b"hello"


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_connect_to_another_user(tmp_path: Path) -> None:
    """Whoever listens on a Unix socket must be this user or root."""
    address = Address(path=str(tmp_path / "node.sock"))
    tmp_path.chmod(0o1777)
    for directory in list(tmp_path.parents)[:-2]:
        directory.chmod(directory.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        listener = address.listen()
    finally:
        os.seteuid(0)
    with listener, pytest.raises(PermissionError, match="runs as uid 65534. Allowed"):
        address.connect(timeout_s=5)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707])
def test_directory_that_others_write_to(tmp_path: Path, mode: int) -> None:
    """Whoever may write there can put a socket in place of the node's."""
    address = Address(path=str(tmp_path / "node.sock"))
    with address.listen():
        tmp_path.chmod(mode)
        problem = (
            rf"{tmp_path} of the socket has mode 0{mode:o}\. Allowed: .* chmod go-w"
        )
        with pytest.raises(PermissionError, match=problem):
            address.connect(timeout_s=5)
        with pytest.raises(PermissionError, match=problem):
            address.listen()
        tmp_path.chmod(mode | 0o1000)
        address.connect(timeout_s=5).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the owner needs root")
def test_directory_of_another_user(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "node.sock"))
    with address.listen():
        os.chown(tmp_path, 12345, -1)
        problem = "of the socket belongs to uid 12345. Allowed: one of uid 0 or root"
        with pytest.raises(PermissionError, match=problem):
            address.connect(timeout_s=5)
        with pytest.raises(PermissionError, match=problem):
            address.listen()


def test_listen_taken(tmp_path: Path) -> None:
    unix = Address(path=str(tmp_path / "node.sock"))
    with unix.listen(), pytest.raises(OSError, match="already in use"):
        unix.listen()
    with Address(host="127.0.0.1").listen() as listener:
        taken = Address(host="127.0.0.1", port=listener.getsockname()[1])
        with pytest.raises(OSError, match="already in use"):
            taken.listen()


def test_listen_unix_replaces_a_dead_socket(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "node.sock"))
    address.listen().close()
    assert Path(address.path).is_socket()
    assert exchange(address.listen(), address) == b"hello"


def test_listen_unix_leaves_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="already in use"):
        Address(path=str(path)).listen()
    assert path.read_text() == "data"


def test_connect_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Address(path=str(tmp_path / "nobody.sock")).connect(timeout_s=1)
    with Address(host="127.0.0.1").listen() as listener:
        free = Address(host="127.0.0.1", port=listener.getsockname()[1])
    with pytest.raises(ConnectionRefusedError):
        free.connect(timeout_s=1)
