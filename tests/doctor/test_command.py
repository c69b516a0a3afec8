# SPDX-License-Identifier: Apache-2.0
"""The command on a host without vLLM, its options, and checks that go wrong."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doctor_findings import CONFIGS
from node_process import running_node
from package_copies import copy_package, link_site_packages, run_command

from vllm_attn_offload.commands import main
from vllm_attn_offload.doctor.check import Check, run_checks
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.doctor.options import add_options, given_model, given_options


@pytest.fixture(scope="module")
def without_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is installed but vLLM; and this package."""
    directory = tmp_path_factory.mktemp("no-vllm")
    link_site_packages(directory, without=["vllm"])
    return copy_package(directory)


def test_host_of_a_node(without_vllm: Path, tmp_path: Path) -> None:
    """Checks end with findings, in a second or so, one line each."""
    with running_node(tmp_path, "--kv-cache-gib", "0.1") as node:
        good = run_command(
            *("doctor", str(CONFIGS / "llama-3-8b"), "--memory-nodes", node.address),
            paths=[without_vllm],
            is_bare=True,
        )
        assert good.returncode == 0, good.stdout + good.stderr
        assert "no vLLM: this host can run memory nodes" in good.stdout
        assert f"memory node {node.address}" in good.stdout
        assert "ok   shared memory" in good.stdout
        assert "not checked: vLLM is not installed" in good.stdout
        assert "1 memory node(s) together hold 819 tokens" in good.stdout
        assert "It would serve: 0 failed" in good.stdout
        assert "exchange" not in good.stdout
        assert "\x1b" not in good.stdout
        bad = run_command(
            *(
                "doctor",
                "--memory-nodes",
                f"{node.address},127.0.0.1:1",
                "--json",
                "--probe",
            ),
            paths=[without_vllm],
            is_bare=True,
        )
    assert bad.returncode == 1
    findings = json.loads(bad.stdout)
    (failed,) = [each for each in findings if each["severity"] == "fail"]
    assert failed["subject"] == "memory node 127.0.0.1:1"
    assert failed["check"] == "connection"
    assert failed["allowed"]
    assert failed["do"]
    assert findings[-1]["found"] == "not measured: another check failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-nodes", "nowhere"], "'nowhere' is not an address"),
        (["--attention-offload-config", '{"nodes": 1}'], "has no option nodes"),
        (["--attention-offload-config.kv_cache_gib", "-1"], "kv_cache_gib was given"),
        (["--tls-cert", "a.pem"], "Give the missing ones: --tls-key, --tls-ca"),
        (["--engine-options", "--dtype", "auto"], "was given without a model"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml cannot be read"),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--timeout-s", "0"],
        ["--timeout-s", "1e300"],
        ["--timeout-s", "nan"],
        ["--attention-offload-config", "[]"],
        ["--attention-offload-config", "{"],
    ],
)
def test_malformed_options(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", *arguments])
    assert "Allowed: " in capsys.readouterr().err


def options_of(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return given_options(parser.parse_args(arguments))


def model_of(*arguments: str) -> str:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="")
    add_options(parser)
    return given_model(parser.parse_args(arguments))


def test_options_of_engines(tmp_path: Path) -> None:
    """The shorter spelling wins over the longer one, and both over the file."""
    pytest.importorskip("yaml")
    assert options_of() == {}
    file = tmp_path / "engine.yaml"
    file.write_text(
        "model: some\n"
        "attention-offload-config:\n  memory-nodes: [a:1]\n  kv-cache-gib: 4\n"
    )
    longer = ("--attention-offload-config", '{"partition": "heads"}')
    dotted = ("--attention-offload-config.kv_cache_gib", "2")
    assert options_of("--config", str(file), *longer, *dotted) == {
        "memory_nodes": ["a:1"],
        "kv_cache_gib": "2",
        "partition": "heads",
    }
    shorter = ("--memory-nodes", "b:2,c:3", "--auth-token-file", "t")
    given = options_of("--config", str(file), *shorter)
    assert given["memory_nodes"] == "b:2,c:3"
    assert given["auth_token_file"] == "t"
    assert model_of("--config", str(file)) == "some"
    assert model_of("other", "--config", str(file)) == "other"
    assert model_of() == ""
    file.write_text("just text\n")
    with pytest.raises(ValueError, match="holds no options"):
        options_of("--config", str(file))


def broken() -> Iterator[Finding]:
    yield Finding.ok("first", "well")
    raise RuntimeError("of a test")


def silent() -> Iterator[Finding]:
    yield Finding.ok("before", "in time")
    time.sleep(60)
    yield Finding.ok("silent", "late")


def test_checks_that_go_wrong() -> None:
    """None of them ends or delays the others."""
    well = Check("a", "well", lambda: [Finding.ok("well", "it is")])
    checks = [Check("a", "broken", broken), Check("a", "silent", silent, 0.2), well]
    start = time.monotonic()
    found = {check.name: findings for check, findings in run_checks(checks)}
    assert time.monotonic() - start < 30
    assert [each.severity for each in found["broken"]] == ["ok", "fail"]
    assert "RuntimeError: of a test" in found["broken"][1].found
    assert [each.check for each in found["silent"]] == ["before", "silent"]
    assert found["silent"][1].found == "no answer within 0.2 s"
    assert [each.severity for each in found["well"]] == ["ok"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("A is 1. Allowed: 2. Write 2.", ("A is 1", "2", "Write 2.")),
        ("A is 1. It is odd. Write 2.", ("A is 1. It is odd", "even", "Write 2.")),
        ("A is 1.", ("A is 1", "even", "Correct it.")),
    ],
)
def test_parts_of_an_error(text: str, parts: tuple[str, str, str]) -> None:
    finding = Finding.of_error("a", ValueError(text), "even")
    assert (finding.found, finding.allowed, finding.do) == parts
