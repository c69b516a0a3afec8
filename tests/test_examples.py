# SPDX-License-Identifier: Apache-2.0
"""Examples: commands through the real parsers, and memory nodes that really start."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml
from harness.processes import ManagedProcess, free_port
from node_process import COMMAND, NodeProcess, eventually
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm_attn_offload.patches import apply_patches, revert_patches

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.args import parse_options

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
UNIT = EXAMPLES / "vllm-memory-node.service"
TOKEN = "/run/secrets/token"
#: Takes the place of the engine, whose start takes half a minute.
RECORD_ARGUMENTS = """#!/bin/sh
printf '%s\\0' "$@" >"$RECORD/$$.partial"
mv "$RECORD/$$.partial" "$RECORD/$$"
exec sleep 60
"""

ServeOptions = Callable[[list[str]], AttentionOffloadConfig]


@pytest.fixture
def serve_options(smollm2: str) -> Iterator[ServeOptions]:
    """What ``vllm serve`` offloads with, by the parser of that command."""

    def parse(command: list[str]) -> AttentionOffloadConfig:
        verb, *arguments = command
        assert verb == "serve"
        namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        namespace.model = namespace.model_tag
        additional = AsyncEngineArgs.from_cli_args(namespace).additional_config
        config = AttentionOffloadConfig.from_additional_config(additional)
        assert config is not None
        return config

    apply_patches()
    yield parse
    revert_patches()


@pytest.fixture
def compose() -> dict[str, Any]:
    """The composition with its variables left at their defaults."""
    text = (EXAMPLES / "docker-compose.yml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text))


@contextmanager
def running_script(
    script: str, work: Path, num_engines: int, *arguments: str, **variables: str
) -> Iterator[list[list[str]]]:
    """Run an example with real nodes; yields the arguments of every ``vllm``."""
    tools, record = work / "tools", work / "record"
    tools.mkdir()
    record.mkdir()
    (tools / "vllm").write_text(RECORD_ARGUMENTS)
    (tools / "vllm").chmod(0o755)
    variables["PATH"] = f"{tools}:{COMMAND.parent}:{os.environ['PATH']}"
    variables["RECORD"] = str(record)
    log = work / "script.log"
    command = ["bash", EXAMPLES / script, *arguments]
    process = ManagedProcess(script, command, log, variables=variables)

    def recorded() -> list[list[str]]:
        files = [path for path in sorted(record.iterdir()) if not path.suffix]
        return [path.read_text().split("\0")[:-1] for path in files]

    try:
        assert eventually(lambda: len(recorded()) == num_engines, 30), log.read_text()
        yield recorded()
        assert process.process.poll() is None, log.read_text()
    finally:
        process.stop(signal.SIGTERM)


def connected(address: str, config: AttentionOffloadConfig) -> ControlClient:
    """A control channel, opened as an engine with these options opens it."""
    clients: list[ControlClient] = []

    def connect() -> bool:
        try:
            clients.append(ControlClient(address, 5, config.credentials))
        except MemoryNodeError as error:
            if "cannot connect" not in str(error):
                raise
        return bool(clients)

    assert eventually(connect, 30)
    return clients[0]


def unit_command(**changes: str) -> list[str]:
    """``ExecStart`` as systemd expands it, with some variables of the unit changed."""
    service = configparser.ConfigParser(interpolation=None, strict=False)
    service.optionxform = str  # type: ignore[assignment,method-assign]
    service.read_string(UNIT.read_text().replace("\\\n", ""))
    pairs = service["Service"]["Environment"].split()
    variables = dict(pair.split("=", 1) for pair in pairs) | changes
    words: list[str] = []
    for word in service["Service"]["ExecStart"].split():
        if name := re.fullmatch(r"\$(\w+)", word):
            words += variables[name[1]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda m: variables[m[1]], word))
    return words


def test_readme_lists_every_file(root: Path) -> None:
    listed = set(re.findall(r"\]\(([\w.-]+)\)", (EXAMPLES / "README.md").read_text()))
    present = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert listed == present - {"README.md", "Dockerfile.dockerignore"}
    assert "](examples/README.md)" in (root / "README.md").read_text()


def test_offline_uses_options_that_exist() -> None:
    tree = ast.parse((EXAMPLES / "offline.py").read_text())
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "LLM"
    )
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    options = ast.literal_eval(given.pop("attention_offload_config"))
    assert AttentionOffloadConfig.from_dict(options).kv_cache_gib
    assert given.keys() <= {field.name for field in dataclasses.fields(EngineArgs)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_serve_remote_nodes(
    serve_options: ServeOptions, smollm2: str, tmp_path: Path
) -> None:
    nodes = tuple(f"127.0.0.1:{free_port()}" for _ in range(2))
    variables = {
        "TOKEN": str(tmp_path / "token"),
        **{"NODE_1": nodes[0], "NODE_2": nodes[1], "KV_CACHE_GIB": "0.1"},
    }
    script = "serve_remote_nodes.sh"
    with running_script(script, tmp_path, 1, smollm2, **variables) as (command,):
        config = serve_options(command)
        assert config.memory_nodes == nodes
        for address in nodes:
            with closing(connected(address, config)) as client:
                assert client.info.kv_bytes_total > 0
            with pytest.raises(MemoryNodeError, match="token"):
                connected(address, AttentionOffloadConfig())
    for address in nodes:
        with pytest.raises(MemoryNodeError, match="cannot connect"):
            ControlClient(address, 5, config.credentials)


def test_two_engines_one_pool(
    serve_options: ServeOptions, smollm2: str, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path / 'node.sock'}"
    with running_script(
        "two_engines_one_pool.sh",
        *(tmp_path, 2, smollm2, smollm2, "--enforce-eager"),
        **{"NODE": address, "KV_CACHE_GIB": "0.1"},
    ) as commands:
        configs = [serve_options(command) for command in commands]
        assert [config.memory_nodes for config in configs] == [(address,)] * 2
        with closing(connected(address, configs[0])) as client:
            total_gib = client.info.kv_bytes_total / 2**30
        assert sum(config.kv_cache_gib or 1 for config in configs) == pytest.approx(
            total_gib
        )
    assert not (tmp_path / "node.sock").exists()


def test_compose_commands(
    compose: dict[str, Any], serve_options: ServeOptions, smollm2: str
) -> None:
    """Options exist, and the engine uses the composition's nodes, port and token."""
    services = compose["services"]
    engine = services.pop("engine")
    addresses = []
    for name, service in services.items():
        program, *options = service["command"]
        assert program == COMMAND.name
        parsed = parse_options(options)
        assert parsed.auth_token_file == TOKEN
        addresses.append(f"{name}:{parsed.listen.port}")
    program, *arguments = engine["command"]
    assert program == "vllm"
    arguments[1] = smollm2  # the default is a name that a hub resolves
    config = serve_options(arguments)
    assert list(config.memory_nodes) == addresses
    assert config.auth_token_file == TOKEN
    assert engine["depends_on"].keys() == services.keys()


def test_compose_files(compose: dict[str, Any]) -> None:
    """Every service gets the token and is built from a Dockerfile that is there."""
    assert f"/run/secrets/{next(iter(compose['secrets']))}" == TOKEN
    for service in compose["services"].values():
        assert service["secrets"] == list(compose["secrets"])
        assert service["healthcheck"]["test"]
        context = EXAMPLES / service["build"]["context"]
        assert (context / service["build"]["dockerfile"]).is_file()


def test_compose_node_is_healthy_once_it_listens(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    """The health check fails where no node runs, and passes where one does."""
    service = compose["services"]["node-1"]
    kind, program, *arguments = service["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    port = str(free_port())
    check = [sys.executable, *(part.replace("9400", port) for part in arguments)]
    assert subprocess.run(check, capture_output=True).returncode == 1
    listen = f"unix:{tmp_path / 'node.sock'}"
    options = ("--metrics-port", port, "--kv-cache-gib", "0.1")
    node = NodeProcess(listen, tmp_path / "node.log", *options)
    try:
        assert subprocess.run(check).returncode == 0
    finally:
        node.kill()


def test_unit_command() -> None:
    """Options exist, and further ones reach the node."""
    program, *options = unit_command(OPTIONS="--attention-kernel cpp")
    assert Path(program).name == COMMAND.name
    parsed = parse_options(options)
    assert not parsed.listen.is_local
    assert parsed.attention_kernel == "cpp"


@pytest.mark.skipif(not which("systemd-analyze"), reason="needs systemd-analyze")
def test_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    """With the installed command in place of the one that a user installs."""
    unit = tmp_path / UNIT.name
    program = unit_command()[0]
    unit.write_text(UNIT.read_text().replace(program, shlex.quote(str(COMMAND))))
    for options in (("verify",), ("security", "--offline=yes", "--threshold=20")):
        ended = subprocess.run(
            ["systemd-analyze", "--no-pager", *options, unit],
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert unit.name not in ended.stderr
