# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS between engines and nodes, on control connections and data channels."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from certificates import Authority, Identity
from node_process import NodeProcess, eventually
from paged_batch import PagedBatch, max_error
from raw_session import RawSession, make_geometry

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.handshake import connect as connect_raw
from vllm_attn_offload.client.neighbour import connect_nearest
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

StartNode = Callable[..., NodeProcess]


def credentials_of(identity: Identity, token_file: str = "") -> Credentials:
    return Credentials(token_file, identity.cert, identity.key, identity.ca)


def connect(node: NodeProcess, credentials: Credentials) -> None:
    with closing(ControlClient(node.address, 5, credentials)) as client:
        assert client.stats().node.pid == node.process.pid


def test_tls(
    node_with_tls: NodeProcess,
    authority: Authority,
    token_file: Path,
    other_token_file: Path,
) -> None:
    engine = authority.sign("engine", "DNS:engine")
    connect(node_with_tls, credentials_of(engine, str(token_file)))
    with pytest.raises(MemoryNodeError, match="the token is not the one"):
        connect(node_with_tls, credentials_of(engine, str(other_token_file)))


@pytest.mark.usefixtures("authority")
def test_renewed_certificates(start_node: StartNode, tmp_path: Path) -> None:
    """Both sides follow another authority without a restart, or say what is amiss."""
    old = Authority(tmp_path)
    node_files = old.sign("node", "IP:127.0.0.1")
    engine_files = old.sign("engine", "DNS:engine")
    node = start_node("127.0.0.1:0", *node_files.options)
    credentials = credentials_of(engine_files)
    with closing(ControlClient(node.address, 5, credentials)) as before:
        new = Authority(tmp_path)  # the same names of files
        new.sign("node", "IP:127.0.0.1")
        with pytest.raises(MemoryNodeError, match="TLS was not agreed"):
            connect(node, credentials)
        new.sign("engine", "DNS:engine")
        connect(node, credentials)
        before.ping(5)
    Path(node_files.key).unlink()
    with pytest.raises(MemoryNodeError):
        connect(node, credentials)
    assert eventually(lambda: "refused a connection of 127.0.0.1: here" in node.log())
    Path(engine_files.key).unlink()
    with pytest.raises(MemoryNodeError, match="here, tls_key .* is not a file"):
        connect(node, credentials)


def test_expiry_and_refusals(
    node_with_tls: NodeProcess, authority: Authority, token_file: Path
) -> None:
    """A node tells when its certificate ends, and counts peers that show none."""
    engine = authority.sign("engine", "DNS:engine")
    trusted = credentials_of(engine, str(token_file))
    with closing(ControlClient(node_with_tls.address, 5, trusted)) as client:
        before = client.stats()
        left_s = before.certificate_expires - time.time()
        assert 86400 - 3600 < left_s <= 86400
        with pytest.raises(MemoryNodeError):
            connect(node_with_tls, Credentials(str(token_file)))
        assert eventually(
            lambda: client.stats().refused["tls"] == before.refused["tls"] + 1
        )


def test_what_is_no_refusal(
    node_with_tls: NodeProcess, authority: Authority, token_file: Path
) -> None:
    """A probe that looks whether the port is open, and a break after the handshake."""
    engine = authority.sign("engine", "DNS:engine")
    trusted = credentials_of(engine, str(token_file))
    address = node_with_tls.address
    with closing(ControlClient(address, 5, trusted)) as client:
        before = client.stats()
        for _ in range(3):
            with Address.parse(address).connect(5) as probe:
                probe.shutdown(socket.SHUT_WR)
                while probe.recv(1024):  # an alert of TLS
                    continue
        admitted, _ = connect_raw(address, 5, trusted)
        with admitted:
            os.write(admitted.fileno(), b"no record of TLS" * 100)
            assert eventually(
                lambda: client.stats().num_connections == before.num_connections
            )
        assert client.stats().refused == before.refused


def test_a_worker_of_the_host_leaves_tls(
    start_node: StartNode, authority: Authority, token_file: Path, tmp_path: Path
) -> None:
    """For the Unix socket: the kernel names its user, and the token is asked for."""
    node_files = authority.sign("neighbour", "IP:127.0.0.1")
    token = ("--auth-token-file", str(token_file))
    unix = ("--listen", f"unix:{tmp_path / 'n.sock'}")
    node = start_node("127.0.0.1:0", *unix, *node_files.options, *token)
    trusted = credentials_of(authority.sign("engine", "DNS:e"), str(token_file))
    with connect_nearest(node.address, 5, trusted) as sock:
        assert sock.family == socket.AF_UNIX
    with pytest.raises(MemoryNodeError, match="it asks for a token"):
        ControlClient(f"unix:{tmp_path / 'n.sock'}", 5)


def test_silent_peer_of_a_node_with_tls(node_with_tls: NodeProcess) -> None:
    """It gets no further than the handshake's deadline."""
    with Address.parse(node_with_tls.address).connect(5) as sock:
        sock.settimeout(20)
        assert sock.recv(1) == b""
    connections = psutil.Process(node_with_tls.process.pid).net_connections()
    assert [c.status for c in connections if c.raddr] == []


def test_options_of_an_engine(authority: Authority, token_file: Path) -> None:
    """They name files; what is in the files stays out of what vLLM hashes and logs."""
    identity = authority.sign("config", "DNS:config")
    config = AttentionOffloadConfig(
        auth_token_file=str(token_file),
        tls_cert=identity.cert,
        tls_key=identity.key,
        tls_ca=identity.ca,
    )
    token = config.credentials.read_token()
    assert token == token_file.read_bytes().strip()
    assert config.credentials.compute_context() is not None
    assert token.decode() not in repr(config)
    assert AttentionOffloadConfig().credentials == NO_CREDENTIALS
    with pytest.raises(ValueError, match="only some of tls_cert, tls_key and tls_ca"):
        AttentionOffloadConfig(tls_cert=identity.cert)


def test_frames_over_tls(
    node_with_tls: NodeProcess, authority: Authority, token_file: Path
) -> None:
    """Data channels are encrypted, too; the second step is longer than a record."""
    credentials = credentials_of(
        authority.sign("worker", "DNS:worker"), str(token_file)
    )
    geometry = make_geometry()
    batch = PagedBatch(geometry, 16, 1)
    address = node_with_tls.address
    with closing(RawSession(address, geometry, 16, credentials)) as session:
        for num_new in (1, 200, 1):
            step, qkv = batch.grow([num_new])
            session.send_step(step)
            out, _ = session.attend(0, qkv)
            exact, _ = batch.expected(torch.float64)
            assert max_error(out, exact) < 1e-4


def test_tls_refuses_a_stranger(
    node_with_tls: NodeProcess,
    authority: Authority,
    other_authority: Authority,
) -> None:
    """Either side refuses a certificate of another authority."""
    stranger = other_authority.sign("stranger", "IP:127.0.0.1")
    with pytest.raises(MemoryNodeError, match="TLS was not agreed"):
        connect(node_with_tls, credentials_of(stranger))
    ours = authority.sign("ours", "DNS:ours")
    gullible = Identity(stranger.cert, stranger.key, ours.ca)
    with pytest.raises(MemoryNodeError, match="TLS was not agreed"):
        connect(node_with_tls, credentials_of(gullible))
    assert eventually(lambda: "refused a connection of" in node_with_tls.log())


def test_tls_compares_the_name(
    node_with_tls: NodeProcess, authority: Authority, token_file: Path
) -> None:
    """The node's certificate names its address only."""
    credentials = credentials_of(
        authority.sign("engine", "DNS:engine"), str(token_file)
    )
    port = Address.parse(node_with_tls.address).port
    with pytest.raises(MemoryNodeError, match="TLS was not agreed.*Hostname mismatch"):
        ControlClient(f"localhost:{port}", 5, credentials)


def test_tls_on_one_side(
    node_with_tls: NodeProcess, node: NodeProcess, authority: Authority
) -> None:
    with pytest.raises(MemoryNodeError, match="the connection broke"):
        connect(node_with_tls, NO_CREDENTIALS)
    with pytest.raises(MemoryNodeError, match="TLS was not agreed"):
        connect(node, credentials_of(authority.sign("engine", "DNS:engine")))
    sentence = "Check that the peer is vllm-attn-offload and that both sides use TLS"
    assert eventually(lambda: sentence in node.log())


def test_tls_files(authority: Authority, tmp_path: Path) -> None:
    one, other = (authority.sign(name, "DNS:a") for name in ("one", "other"))
    with pytest.raises(ValueError, match="Check that the key belongs"):
        credentials_of(Identity(one.cert, other.key, one.ca)).compute_context()
    with pytest.raises(ValueError, match=r"tls_key '/nowhere' is not a file"):
        credentials_of(Identity(one.cert, "/nowhere", one.ca)).compute_context()
