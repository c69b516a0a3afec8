# SPDX-License-Identifier: Apache-2.0
"""Tokens and certificates that a node does not take, or that end soon."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from certificates import Authority, Identity
from doctor_findings import one
from doctor_nodes import StartNode, case, look_at
from node_process import NodeProcess

from vllm_attn_offload.doctor.certificates import check_credentials
from vllm_attn_offload.transport.address import Address


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    return write_token(tmp_path / "token", "0123456789abcdef" * 4)


def write_token(path: Path, text: str) -> str:
    path.touch(mode=0o600)
    path.write_text(text)
    return str(path)


def test_tokens(
    start: StartNode, token_file: str, tmp_path: Path, shared_node: NodeProcess
) -> None:
    node = start("--auth-token-file", token_file)
    wrong = write_token(tmp_path / "wrong", "f" * 64)
    one(look_at(node.address, auth_token_file=token_file), "connection", "ok")
    wrong_token = one(look_at(node.address, auth_token_file=wrong), "token")
    assert "the token is not the one of this memory node" in wrong_token.found
    assert "none was given" in one(look_at(node.address), "token").found
    not_asked = look_at(shared_node.address, auth_token_file=token_file)
    assert "it asks for no token" in one(not_asked, "token").found


def test_files_of_credentials(token_file: str) -> None:
    os.chmod(token_file, 0o644)
    open_file = case("10.0.0.7:7600", auth_token_file=token_file)
    found = one(list(check_credentials(open_file)), "credentials").found
    assert "has mode 0644" in found
    no_file = case("10.0.0.7:7600", auth_token_file="/nowhere")
    one(list(check_credentials(no_file)), "credentials")
    nothing = list(check_credentials(case("10.0.0.7:7600")))
    assert "10.0.0.7:7600" in one(nothing, "credentials", "warn").found


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    return Authority(tmp_path_factory.mktemp("authority"))


def files(identity: Identity) -> dict[str, str]:
    return {
        "tls_cert": identity.cert,
        "tls_key": identity.key,
        "tls_ca": identity.ca,
    }


def test_certificates(
    start: StartNode, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> None:
    node = start(*authority.sign("node", "IP:127.0.0.1").options)
    engine = files(authority.sign("engine", "DNS:engine", days=90))
    findings = look_at(node.address, **engine)
    soon = one(findings, "certificate", "warn").found
    assert "the node's certificate expires on" in soon
    by_name = f"localhost:{Address.parse(node.address).port}"
    found = one(look_at(by_name, **engine), "certificate").found
    assert "is of another name: Hostname mismatch" in found
    stranger = Authority(tmp_path_factory.mktemp("stranger")).sign("me", "DNS:me")
    found = one(look_at(node.address, **files(stranger)), "certificate").found
    assert "is not trusted" in found
    plain = one(look_at(node.address), "connection")
    assert "only one side was given the tls options" in plain.do
    one(list(check_credentials(case(node.address, **engine))), "certificate", "ok")


def test_expired_certificates(start: StartNode, authority: Authority) -> None:
    node = start(*authority.sign("old-node", "IP:127.0.0.1", days=-1).options)
    engine = files(authority.sign("engine", "DNS:engine"))
    found = one(look_at(node.address, **engine), "certificate").found
    assert "the node's certificate, or its authority's, has expired" in found
    old = files(authority.sign("old-engine", "DNS:engine", days=-1))
    ours = list(check_credentials(case(node.address, **old)))
    assert "tls_cert expired on" in one(ours, "certificate").found
