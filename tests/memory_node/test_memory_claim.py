# SPDX-License-Identifier: Apache-2.0
"""Nodes of one host that know of each other's promises."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from node_process import COMMAND, NodeProcess

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.memory_node.memory_claim import MemoryClaim
from vllm_attn_offload.protocol.messages import GIB

UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}
#: What a process that starts takes of its promise for itself, and rounding.
SLACK_BYTES = GIB // 4

Start = Callable[..., NodeProcess]


@pytest.fixture
def prefix() -> Iterator[tuple[str, ...]]:
    """Runs a command where it sees no promise of other tests, nor they its own."""
    unshare = ("unshare", "--user", "--map-root-user", "--net")
    with subprocess.Popen(
        [*unshare, "sh", "-c", "echo && exec sleep 600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as keeper:
        assert keeper.stdout is not None
        if not keeper.stdout.readline():
            pytest.skip("no network namespace can be made here")
        yield ("nsenter", "--user", "--net", f"--target={keeper.pid}")
        keeper.kill()


@pytest.fixture
def start(tmp_path: Path, prefix: tuple[str, ...]) -> Iterator[Start]:
    nodes: list[NodeProcess] = []

    def start_node(*options: str) -> NodeProcess:
        name = tmp_path / f"node-{len(nodes)}"
        nodes.append(
            NodeProcess(
                f"unix:{name}.sock", Path(f"{name}.log"), *options, prefix=prefix
            )
        )
        return nodes[-1]

    yield start_node
    for node in nodes:
        node.kill()


def kv_bytes(node: NodeProcess) -> int:
    client = ControlClient(node.address, 5)
    try:
        return client.info.kv_bytes_total
    finally:
        client.close()


def found(node: NodeProcess) -> tuple[int, int]:
    """Bytes that were available and of them promised, as the node logs them."""
    sizes = r"\(([0-9.]+ \w+) are available, ([0-9.]+ \w+) of them promised by other"
    match = re.search(sizes, node.log())
    assert match is not None
    available, promised = (
        int(float(number) * UNITS[unit])
        for number, unit in (size.split() for size in match.groups())
    )
    return available, promised


def test_defaults_share_what_is_there(start: Start) -> None:
    """Each takes half of what the others have left, and says what it found."""
    before = 0
    for node in [start() for _ in range(3)]:
        available, promised = found(node)
        assert abs(promised - before) < SLACK_BYTES
        assert abs(kv_bytes(node) - (available - promised) // 2) < SLACK_BYTES
        assert "WARNING" not in node.log()
        before += kv_bytes(node)
    assert before < available


def test_explicit_excess_warns(start: Start, prefix: tuple[str, ...]) -> None:
    """It is told what it is; a default beside it has nothing left to take."""
    most = 0.6 * psutil.virtual_memory().available / GIB
    first, second = (
        start("--kv-cache-gib", f"{most}"),
        start("--kv-cache-gib", f"{most}"),
    )
    assert "WARNING" not in first.log()
    warning, announced = second.log().splitlines()[:2]
    assert "ready on" in announced
    assert "WARNING" in warning
    assert f"--kv-cache-gib {kv_bytes(second) / GIB:g} and the " in warning
    assert "than what is available. Allowed, but nodes are killed" in warning
    assert "Lower --kv-cache-gib, or stop another node." in warning
    ended = subprocess.run(
        [*prefix, COMMAND, "--listen", f"{second.address}-3"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "other memory nodes of this host have promised all of the" in ended.stderr
    assert "Stop another node, or give --kv-cache-gib." in ended.stderr


def test_unknown_promises_are_said() -> None:
    claim = MemoryClaim(GIB, 4 * GIB, 0, "Permission denied", None)
    assert claim.describe() == (
        "4.00 GiB are available, what other nodes have promised is unknown "
        "(Permission denied)"
    )
    assert not claim.warning()
