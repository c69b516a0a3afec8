# SPDX-License-Identifier: Apache-2.0
"""An engine over two hosts with ``--nnodes``, memory nodes on a third, and losses.

Hosts are network namespaces with shared memory of their own.
"""

from __future__ import annotations

import pytest
from engine_on_hosts import DEADLINE_S, EngineOnHosts, Stock
from harness import faults
from node_process import eventually
from nodes_on_host import NodesOnHost

pytestmark = pytest.mark.long


def test_tokens(engine: EngineOnHosts, stock: Stock, nodes: NodesOnHost) -> None:
    """They are stock vLLM's on the same two hosts; each rank has a session per node."""
    assert engine.stream().finish(DEADLINE_S) == stock.tokens
    assert nodes.num_sessions() == 4


def test_second_rank_is_cut_off(
    engine: EngineOnHosts, stock: Stock, nodes: NodesOnHost
) -> None:
    """The first one computes with it, and must not believe what comes of it."""
    before = engine.num_recoveries()
    streams = engine.half_way()
    address = nodes.running[0].address
    assert faults.drop_connections(engine.follower_worker(), address) == 1
    assert streams.finish(DEADLINE_S) == stock.tokens
    assert engine.num_recoveries() == before + 1


def test_killed_node(engine: EngineOnHosts, stock: Stock, nodes: NodesOnHost) -> None:
    """Both ranks lose it, and go on with the standby."""
    before = engine.num_recoveries()
    streams = engine.half_way()
    nodes.running[1].kill()
    assert streams.finish(DEADLINE_S) == stock.tokens
    assert engine.num_recoveries() == before + 1
    assert nodes.num_sessions() == 4


def test_killed_follower(
    engine: EngineOnHosts, stock: Stock, nodes: NodesOnHost
) -> None:
    """The engine ends as stock vLLM does, and its sessions with it."""
    assert engine.lose_follower() == stock.end
    assert not stock.end.num_silent
    assert eventually(lambda: not nodes.num_sessions(), timeout_s=5.0)
