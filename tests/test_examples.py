# SPDX-License-Identifier: Apache-2.0
"""Examples: commands through the real parsers, and memory nodes that really start."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from harness.processes import ManagedProcess, free_port
from node_process import COMMAND, eventually
from serve_options import serve_options
from vllm.engine.arg_utils import EngineArgs

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.errors import MemoryNodeError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
#: Takes the place of the engine, whose start takes half a minute.
RECORD_ARGUMENTS = """#!/bin/sh
printf '%s\\0' "$@" >"$RECORD/$$.partial"
mv "$RECORD/$$.partial" "$RECORD/$$"
exec sleep 60
"""


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


def test_readme_lists_every_file(root: Path) -> None:
    listed = set(re.findall(r"\]\(([\w.-]+)\)", (EXAMPLES / "README.md").read_text()))
    present = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert listed == present - {"README.md"}
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


def test_serve_remote_nodes(smollm2: str, tmp_path: Path) -> None:
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


def test_two_engines_one_pool(smollm2: str, tmp_path: Path) -> None:
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
