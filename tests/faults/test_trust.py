# SPDX-License-Identifier: Apache-2.0
"""Who may use a node: tokens on a network, users of a Unix socket."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from node_process import COMMAND, NodeProcess, eventually

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.handshake import call
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.protocol.messages import (
    PROTOCOL_VERSION,
    Authenticate,
    Authenticated,
    Challenge,
    Error,
    GetStats,
    Hello,
    Stats,
    compatibility_hash,
)
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.control import (
    message_decoder,
    receive_message,
    send_message,
)
from vllm_attn_offload.transport.trust import (
    NO_CREDENTIALS,
    Credentials,
    Role,
    is_proof,
    new_nonce,
    prove,
)

StartNode = Callable[..., NodeProcess]
LOOPBACK = "127.0.0.1:0"
HELLO = Hello(PROTOCOL_VERSION, compatibility_hash(), "a test")


def token_of(path: Path) -> Credentials:
    return Credentials(str(path))


def connect(node: NodeProcess, credentials: Credentials) -> None:
    with closing(ControlClient(node.address, 5, credentials)) as client:
        assert client.stats().node.pid == node.process.pid


def test_token(node_with_token: NodeProcess, token_file: Path) -> None:
    connect(node_with_token, token_of(token_file))


def test_wrong_token(node_with_token: NodeProcess, other_token_file: Path) -> None:
    with pytest.raises(MemoryNodeError, match="the token is not the one of this mem"):
        connect(node_with_token, token_of(other_token_file))


def test_no_token(node_with_token: NodeProcess) -> None:
    message = "it asks for a token, and none was given. Set auth_token"
    with pytest.raises(MemoryNodeError, match=message):
        connect(node_with_token, NO_CREDENTIALS)


def test_renewed_token(start_node: StartNode, tmp_path: Path) -> None:
    """Both sides read it per connection; what cannot be read admits nobody."""
    theirs, ours = tmp_path / "node-token", tmp_path / "engine-token"
    for path in (theirs, ours):
        path.touch(mode=0o600)
        path.write_text("a" * 64)
    node = start_node(LOOPBACK, "--auth-token-file", str(theirs))
    with closing(ControlClient(node.address, 5, token_of(ours))) as before:
        theirs.write_text("b" * 64)
        with pytest.raises(MemoryNodeError, match="the token is not the one"):
            connect(node, token_of(ours))
        ours.write_text("b" * 64)
        connect(node, token_of(ours))
        before.ping(5)
    theirs.unlink()
    with pytest.raises(MemoryNodeError, match="the connection broke"):
        connect(node, token_of(ours))
    refusal = f"refused a connection of 127.0.0.1: here, auth_token_file '{theirs}'"
    assert eventually(lambda: refusal in node.log())
    ours.chmod(0o644)
    with pytest.raises(MemoryNodeError, match="here, auth_token_file .* has mode 0644"):
        connect(node, token_of(ours))


def test_no_token_in_the_log(
    node_with_token: NodeProcess, token_file: Path, other_token_file: Path
) -> None:
    with pytest.raises(MemoryNodeError):
        connect(node_with_token, token_of(other_token_file))
    refusal = "refused a connection of 127.0.0.1: the token is not the one"
    assert eventually(lambda: refusal in node_with_token.log())
    assert other_token_file.read_text() not in node_with_token.log()
    assert token_file.read_text().strip() not in node_with_token.log()


def test_replayed_handshake(node_with_token: NodeProcess, token_file: Path) -> None:
    """What was overheard on one connection opens no other."""
    token = token_of(token_file).read_token()
    address = Address.parse(node_with_token.address)
    with address.connect(5) as first, address.connect(5) as second:
        theirs = call(first, "node", HELLO, Challenge, 5).nonce
        ours = new_nonce()
        overheard = Authenticate(ours, prove(token, Role.COMPUTE_NODE, theirs, ours))
        answer = call(first, "node", overheard, Authenticated, 5)
        assert is_proof(answer.proof, token, Role.MEMORY_NODE, theirs, ours)
        assert not is_proof(answer.proof, token, Role.COMPUTE_NODE, theirs, ours)
        call(second, "node", HELLO, Challenge, 5)
        with pytest.raises(MemoryNodeError, match="the token is not the one"):
            call(second, "node", overheard, Authenticated, 5)


def test_request_without_the_token(node_with_token: NodeProcess) -> None:
    with Address.parse(node_with_token.address).connect(5) as sock:
        call(sock, "node", HELLO, Challenge, 5)
        with pytest.raises(MemoryNodeError, match="the connection broke"):
            call(sock, "node", GetStats(), Stats, 5)


def overhear(node: NodeProcess, heard: bytearray) -> str:
    """Address of a relay to a node for one connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                heard.extend(data)
                target.sendall(data)

    def relay() -> None:
        client, _ = listener.accept()
        with listener, client, Address.parse(node.address).connect(5) as upstream:
            back = threading.Thread(target=copy, args=(upstream, client), daemon=True)
            back.start()
            copy(client, upstream)

    threading.Thread(target=relay, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_nothing_secret_travels(node_with_token: NodeProcess, token_file: Path) -> None:
    heard = bytearray()
    address = overhear(node_with_token, heard)
    ControlClient(address, 5, token_of(token_file)).close()
    token = token_of(token_file).read_token()
    assert len(heard) > 200
    assert token not in heard
    assert bytes.fromhex(token.decode()) not in heard


def impostor(answer: Callable[[Authenticate], Authenticated | Error]) -> str:
    """Address of something that asks for a token and does not know it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        with listener, sock:
            receive_message(sock, message_decoder(Hello), max_bytes=4096, timeout_s=5)
            send_message(sock, Challenge(new_nonce()), 5)
            decoder = message_decoder(Authenticate)
            request = receive_message(sock, decoder, max_bytes=4096, timeout_s=5)
            send_message(sock, answer(request), 5)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_impostor(node_with_token: NodeProcess, token_file: Path) -> None:
    """A node that reflects the engine's own proof is found out."""
    credentials = token_of(token_file)
    with closing(ControlClient(node_with_token.address, 5, credentials)) as client:
        info = client.info
    address = impostor(lambda request: Authenticated(request.proof, info))
    with pytest.raises(MemoryNodeError, match="does not know the token of auth_token"):
        ControlClient(address, 5, credentials)


def test_node_without_a_token(node: NodeProcess, other_token_file: Path) -> None:
    """Where the engine has a token, whoever listens on a port must prove it."""
    with pytest.raises(MemoryNodeError, match="it asks for no token, and auth_token"):
        connect(node, token_of(other_token_file))


def test_insecure_warns(start_node: StartNode) -> None:
    node = start_node("0.0.0.0:0", "--insecure")
    assert "WARNING" in node.log()
    assert "--insecure: whoever reaches 0.0.0.0:0 may use this node" in node.log()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--listen", "0.0.0.0:0"), "serves other hosts, and no token was given"),
        (("--tls-cert", "a"), "only some of --tls-cert, --tls-key and --tls-ca"),
        (("--auth-token-file", "a", "--insecure"), "Allowed: one of them"),
        (
            ("--listen=unix:/a", "--tls-cert=a", "--tls-key=a", "--tls-ca=a"),
            "TLS was asked for on unix:/a, which no other host reaches",
        ),
    ],
    ids=["no token", "half of TLS", "both", "TLS on Unix"],
)
def test_options_that_do_not_go_together(
    options: tuple[str, ...], message: str
) -> None:
    ended = subprocess.run(
        [COMMAND, *options], capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 2
    assert message in " ".join(ended.stderr.split())


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0, r"cannot be read \(No such file or directory\)\. Allowed: a file"),
        ("x" * 31, 0o600, r"holds a token of 31 bytes\. Allowed: 32 to"),
        ("x" * 64, 0o640, r"has mode 0640\. Allowed: no access .* Run: chmod 600"),
    ],
    ids=["missing", "short", "readable by others"],
)
def test_token_file(
    tmp_path: Path, content: str | None, mode: int, message: str
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(ValueError, match=message) as error:
        token_of(path).read_token()
    assert "xxx" not in str(error.value)
    options = ("--kv-cache-gib", "0.1", "--auth-token-file", str(path))
    ended = subprocess.run(
        [COMMAND, "--listen", LOOPBACK, *options],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 1
    assert str(error.value) in ended.stderr


def test_token_that_workers_are_told(tmp_path: Path) -> None:
    """None that they find in their file; that of a Ray pool, where it is another."""
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("a" * 32 + "\n")
    assert token_of(path).besides_file(b"a" * 32) == b""
    assert token_of(path).besides_file(b"b" * 32) == b"b" * 32
    assert token_of(path).besides_file(b"") == b""
    assert NO_CREDENTIALS.besides_file(b"b" * 32) == b"b" * 32
    path.unlink()
    assert token_of(path).besides_file(b"b" * 32) == b"b" * 32


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_other_user_on_a_unix_socket(start_node: StartNode) -> None:
    """Also where the socket's mode was opened to everybody."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "node.sock"
        node = start_node(f"unix:{path}")
        path.chmod(0o777)
        os.seteuid(65534)
        try:
            sock = Address(path=str(path)).connect(5)
        finally:
            os.seteuid(0)
        with sock:
            assert sock.recv(1) == b""
    sentence = "the process there runs as uid 65534. Allowed: uid 0 and root"
    assert eventually(lambda: sentence in node.log())
