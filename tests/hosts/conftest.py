# SPDX-License-Identifier: Apache-2.0
"""Three hosts, an engine on two of them, and memory nodes on the third."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_on_hosts import DEADLINE_S, EngineOnHosts, Stock
from harness.network_hosts import network_hosts
from harness.network_namespace import RemoteHost
from nodes_on_host import NodesOnHost


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[RemoteHost]]:
    """Of the leader, the follower and the memory nodes."""
    try:
        with network_hosts(3) as made:
            yield made
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def stock(
    hosts: list[RemoteHost], tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Stock:
    """The reference, which has ended."""
    directory = tmp_path_factory.mktemp("stock-hosts")
    engine = EngineOnHosts(hosts[:2], tiny_model, directory)
    try:
        tokens = engine.stream().finish(DEADLINE_S)
        return Stock(tokens, engine.lose_follower())
    finally:
        engine.kill()


@pytest.fixture(scope="module")
def nodes(
    hosts: list[RemoteHost], node_cpu: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodesOnHost]:
    """Two in use and a standby; their unwritten blocks hold NaN."""
    directory = tmp_path_factory.mktemp("nodes-of-hosts")
    made = NodesOnHost(hosts[2], directory)
    try:
        for _ in range(3):
            made.start(node_cpu)
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def engine(
    stock: Stock,  # has ended: there are few CPUs
    hosts: list[RemoteHost],
    nodes: NodesOnHost,
    tiny_model: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[EngineOnHosts]:
    """The engine with its attention on the nodes."""
    *used, standby = (node.address for node in nodes.running)
    option = "--attention-offload-config."
    running = EngineOnHosts(
        hosts[:2],
        tiny_model,
        tmp_path_factory.mktemp("hosts"),
        *(f"{option}memory_nodes", ",".join(used)),
        *(f"{option}standby_nodes", standby),
        *(f"{option}auth_token_file", str(nodes.token_file)),
    )
    yield running
    running.kill()
