# SPDX-License-Identifier: Apache-2.0
"""Findings about memory nodes, each with a real node that has the defect."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority, Identity
from doctor_findings import CONFIGS, one
from node_process import NodeProcess
from package_copies import copy_package, replace_in
from raw_session import make_geometry, reservation

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.certificates import check_credentials
from vllm_attn_offload.doctor.check import in_background
from vllm_attn_offload.doctor.exchange_probe import probe_exchange
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.doctor.model_size import check_model, read_shape
from vllm_attn_offload.doctor.node_examination import NodeExamination
from vllm_attn_offload.doctor.pool import check_pool
from vllm_attn_offload.transport.address import Address

OPTIONS = ("--kv-cache-gib", "0.25", "--cpus", str(max(os.sched_getaffinity(0))))
MODEL = str(CONFIGS / "llama-3-8b")
StartNode = Callable[..., NodeProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartNode]:
    """Starts nodes on loopback that end with the test."""
    with contextlib.ExitStack() as stack:

        def run(*options: str, listen: str = "127.0.0.1:0", **rest: str) -> NodeProcess:
            log = tmp_path / f"{time.monotonic_ns()}.log"
            node = NodeProcess(listen, log, *OPTIONS, *options, **rest)
            stack.callback(node.kill)
            return node

        yield run


@pytest.fixture(scope="session")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node in good health."""
    log = tmp_path_factory.mktemp("node") / "log"
    node = NodeProcess("127.0.0.1:0", log, *OPTIONS)
    yield node
    node.kill()


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    return write_token(tmp_path / "token", "0123456789abcdef" * 4)


def write_token(path: Path, text: str) -> str:
    path.touch(mode=0o600)
    path.write_text(text)
    return str(path)


def case(address: str, model: str = "", **options: Any) -> Case:
    config = AttentionOffloadConfig(memory_nodes=(address,), **options)
    shape = in_background(lambda: read_shape(model, ())) if model else None
    return Case(config, model=model, shape=shape, timeout_s=1.0)


def look(address: str, model: str = "", **options: Any) -> list[Finding]:
    return list(NodeExamination(address, case(address, model, **options)).run())


def test_good_node(shared_node: NodeProcess) -> None:
    findings = look(shared_node.address, MODEL)
    assert "kernel " in one(findings, "connection", "ok").found
    assert "the median of 100" in one(findings, "round trip", "ok").found
    room = one(findings, "capacity", "ok").found
    assert "2,048 tokens of llama-3-8b in 16 bit" in room


def test_pool(shared_node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "9999")
    of = case(shared_node.address, MODEL)
    node = NodeExamination(shared_node.address, of)
    list(node.run())
    held = "1 memory node(s) together hold 2,048 tokens"
    assert one(list(check_pool(of, [node], lambda: 0)), "pool", "ok").found == held
    one(list(check_pool(of, [node], lambda: 2048)), "pool", "ok")
    finding = one(list(check_pool(of, [node], lambda: 8192)), "pool")
    assert finding.found == f"{held}, and a request may have 8,192"
    assert "--max-model-len 2048" in finding.do


def test_closed_port() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    finding = one(look(f"127.0.0.1:{port}"), "connection")
    assert "Connection refused" in finding.found
    assert "vllm-memory-node" in finding.do


def test_unknown_name() -> None:
    finding = one(look("nobody.invalid:7600"), "name")
    assert "nobody.invalid has no address" in finding.found


def test_silent_node(start: StartNode) -> None:
    """It is stopped: its connections are still accepted."""
    node = start()
    node.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    finding = one(look(node.address), "connection")
    assert "no answer to Hello within 1 s" in finding.found
    assert time.monotonic() - began < 5


def test_tokens(
    start: StartNode, token_file: str, tmp_path: Path, shared_node: NodeProcess
) -> None:
    node = start("--auth-token-file", token_file)
    wrong = write_token(tmp_path / "wrong", "f" * 64)
    one(look(node.address, auth_token_file=token_file), "connection", "ok")
    wrong_token = one(look(node.address, auth_token_file=wrong), "token")
    assert "the token is not the one of this memory node" in wrong_token.found
    assert "none was given" in one(look(node.address), "token").found
    not_asked = look(shared_node.address, auth_token_file=token_file)
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
    findings = look(node.address, **engine)
    soon = one(findings, "certificate", "warn").found
    assert "the node's certificate expires on" in soon
    by_name = f"localhost:{Address.parse(node.address).port}"
    found = one(look(by_name, **engine), "certificate").found
    assert "is of another name: Hostname mismatch" in found
    stranger = Authority(tmp_path_factory.mktemp("stranger")).sign("me", "DNS:me")
    found = one(look(node.address, **files(stranger)), "certificate").found
    assert "is not trusted" in found
    plain = one(look(node.address), "connection")
    assert "only one side was given the tls options" in plain.do
    one(list(check_credentials(case(node.address, **engine))), "certificate", "ok")


def test_expired_certificates(start: StartNode, authority: Authority) -> None:
    node = start(*authority.sign("old-node", "IP:127.0.0.1", days=-1).options)
    engine = files(authority.sign("engine", "DNS:engine"))
    found = one(look(node.address, **engine), "certificate").found
    assert "the node's certificate, or its authority's, has expired" in found
    old = files(authority.sign("old-engine", "DNS:engine", days=-1))
    ours = list(check_credentials(case(node.address, **old)))
    assert "tls_cert expired on" in one(ours, "certificate").found


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
    finding = one(look(start(PYTHONPATH=str(other.parent)).address), "version")
    assert "does not match version 99 of this memory node" in finding.found
    assert "the same vllm-attn-offload release" in finding.do
    findings = look(start(PYTHONPATH=str(newer.parent)).address)
    assert "vllm-attn-offload 7" in one(findings, "version", "warn").found


def test_full_node(shared_node: NodeProcess) -> None:
    with closing(ControlClient(shared_node.address, 5)) as engine:
        free = engine.info.kv_bytes_free
        engine.reserve(reservation(make_geometry(), free))
        finding = one(look(shared_node.address, MODEL), "capacity")
        assert "0 tokens of llama-3-8b" in finding.found
        wanted = look(shared_node.address, kv_cache_gib=0.1)
        assert one(wanted, "capacity").allowed.startswith("0.10 GiB")


def test_shared_memory(start: StartNode, tmp_path: Path) -> None:
    """A second socket of the node is found; one that is not there is named."""
    place = f"unix:{tmp_path}/own.sock"
    node = start("--listen", place)
    for address in (place, node.address):
        found = one(look(address), "shared memory", "ok").found
        assert f"found by {place}" in found
    (tmp_path / "own.sock").rename(tmp_path / "away.sock")
    hint = one(look(node.address), "shared memory", "warn")
    assert f"at {place} cannot connect" in hint.found
    other = start(listen=place)
    hint = one(look(node.address), "shared memory", "warn")
    assert f"at {place} is another node" in hint.found
    other.kill()


def test_shared_memory_is_not_offered(shared_node: NodeProcess) -> None:
    hint = one(look(shared_node.address), "shared memory", "warn")
    assert "a second --listen" in hint.do


def test_slow_network(shared_node: NodeProcess) -> None:
    """Whatever the node sends arrives 2 ms late."""
    node = Address.parse(shared_node.address)
    with slow_relay(node.port) as port:
        finding = one(look(f"127.0.0.1:{port}", MODEL), "round trip", "warn")
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


def test_nodes_on_the_same_cpus(
    start: StartNode, shared_node: NodeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    addresses = (shared_node.address, start().address)
    config = AttentionOffloadConfig(memory_nodes=addresses)
    nodes = [NodeExamination(each, Case(config)) for each in addresses]
    for node in nodes:
        list(node.run())
    findings = list(check_pool(Case(config), nodes, lambda: 0))
    assert findings.pop(0).found.endswith("of one host")
    own_cpu = OPTIONS[-1]
    for finding in findings:
        assert f"has CPUs {own_cpu} of this host, which a worker" in finding.found
    assert len(findings) == 2
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "9999")
    assert len(list(check_pool(Case(config), nodes, lambda: 0))) == 1


def test_nodes_of_ray() -> None:
    config = AttentionOffloadConfig(memory_nodes=("ray:shared",))
    findings = list(check_pool(Case(config), [], lambda: 0))
    assert "not checked: Ray places" in one(findings, "pool", "ok").found


def test_node_that_attends_with_torch(start: StartNode) -> None:
    node = start("--attention-kernel", "torch")
    finding = one(look(node.address), "kernel", "warn")
    assert "attends with torch" in finding.found


def test_probe(shared_node: NodeProcess) -> None:
    findings = list(probe_exchange(case(shared_node.address)))
    assert "GB/s of KV attended" in one(findings, "exchange", "ok").found
    findings = list(probe_exchange(case("127.0.0.1:1")))
    one(findings, "exchange")


def test_model(tmp_path: Path) -> None:
    of = case("127.0.0.1:1", MODEL)
    found = one(list(check_model(of)), "configuration", "ok").found
    assert "14.96 GiB of weights, 32 layers" in found
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    unknown = list(check_model(case("127.0.0.1:1", str(tmp_path))))
    assert "'unheard-of'" in one(unknown, "configuration").found
    absent = list(check_model(case("127.0.0.1:1", "./no/such/model")))
    assert "No config.json" in one(absent, "configuration").found
