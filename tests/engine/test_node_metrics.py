# SPDX-License-Identifier: Apache-2.0
"""Memory nodes on ``/metrics``: right numbers of those that answer, and in time."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest
from node_process import NodeProcess, eventually, running_node
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from raw_session import attach_request, make_geometry, reservation, session_of
from vllm.config import VllmConfig

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.handshake import call, connect
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.cpu_list import format_cpu_list
from vllm_attn_offload.engine.engine_board import ENGINE_BOARD_VARIABLE, EngineBoard
from vllm_attn_offload.engine.node_metrics import (
    NodeStatsReader,
    drop_exported,
    export_node_metrics,
)
from vllm_attn_offload.metrics import StatsCollector
from vllm_attn_offload.metrics.engine import ENGINE_METRICS
from vllm_attn_offload.metrics.node import CERTIFICATE, NODE_METRICS, UP
from vllm_attn_offload.metrics.session import SESSION_METRICS
from vllm_attn_offload.protocol.messages import Attached, ChannelOffer
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.session_stats import SessionStats
from vllm_attn_offload.transport.trust import NO_CREDENTIALS

NUM_SILENT = 12


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    cpu = str(max(os.sched_getaffinity(0)))
    directory = tmp_path_factory.mktemp("node")
    with running_node(directory, "--kv-cache-gib", "0.1", "--cpus", cpu) as process:
        yield process


@pytest.fixture
def silent() -> Iterator[list[str]]:
    """Hosts that accept connections and never answer."""
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            for _ in range(NUM_SILENT)
        ]
        yield [f"127.0.0.1:{each.getsockname()[1]}" for each in listeners]


def name_of(node: NodeProcess) -> str:
    """What the node calls itself."""
    with closing(ControlClient(node.address, 5)) as client:
        return client.info.name


def up(registry: CollectorRegistry) -> dict[str, float]:
    """Whether nodes answered, by their labels."""
    return {
        sample.labels["node"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == UP.sample
    }


def reader_of(*addresses: str) -> NodeStatsReader:
    """A reader of nodes that ask for nothing."""
    return NodeStatsReader(lambda: dict.fromkeys(addresses, NO_CREDENTIALS))


def test_one_second_for_all_nodes(
    node: NodeProcess, silent: list[str], tmp_path: Path
) -> None:
    """Also in the next scrape, when the first one's threads still wait."""
    dead = f"unix:{tmp_path / 'nobody'}"
    reader = reader_of(*silent, node.address, dead)
    registry = CollectorRegistry()
    registry.register(StatsCollector(reader.read))
    with closing(reader):
        texts = []
        for _ in range(3):
            started = time.monotonic()
            texts.append(generate_latest(registry).decode())
            assert time.monotonic() - started < NUM_SILENT / 2
    for text in texts:
        for address in (*silent, dead):
            assert f'memory_node_up{{node="{address}"}} 0.0' in text
            assert f'kv_bytes_free{{node="{address}"}}' not in text
    # A host that is busy may not let the node answer within a second every time.
    name = name_of(node)
    answered = [text for text in texts if f'up{{node="{name}"}} 1.0' in text]
    assert answered
    assert f'kv_bytes_free{{node="{name}"}}' in answered[0]


def test_a_node_that_is_back_is_up(silent: list[str], tmp_path: Path) -> None:
    """Nothing of an earlier scrape is shown."""
    address = f"unix:{tmp_path / 'node.sock'}"
    with closing(reader_of(address, silent[0])) as reader:
        assert reader.read()[address] is None
        with running_node(tmp_path, "--kv-cache-gib", "0.1") as node:
            found = []
            assert eventually(lambda: found.append(reader.read()[address]) or found[-1])
            assert found[-1].node.pid == node.process.pid
        assert reader.read()[address] is None


def test_a_node_keeps_its_name(tmp_path: Path) -> None:
    """Its address is its label until it first answers, and then no more."""
    address = f"unix:{tmp_path / 'node.sock'}"
    registry = CollectorRegistry()
    with closing(reader_of(address)) as reader:
        registry.register(StatsCollector(reader.read))
        assert up(registry) == {address: 0}
        with running_node(tmp_path, "--kv-cache-gib", "0.1") as node:
            name = name_of(node)
            assert name != address
            assert eventually(lambda: up(registry) == {name: 1}, 30)
        assert up(registry) == {name: 0}


def test_nodes_of_one_name(node: NodeProcess) -> None:
    """Prometheus would drop all series of two nodes but those of the last."""
    with closing(ControlClient(node.address, 5)) as client:
        answers = {"10.0.0.1:1": client.stats(), "10.0.0.2:1": client.stats()}
    registry = CollectorRegistry()
    registry.register(StatsCollector(lambda: answers))
    assert up(registry) == dict.fromkeys(answers, 1)


def test_all_that_is_listed_is_exported(node: NodeProcess) -> None:
    """With the labels that are listed, by a node that a worker is attached to."""
    own = max(os.sched_getaffinity(0))
    text = attached(node, ChannelOffer([own], 1, False))
    shown: dict[str, set[tuple[str, ...]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                shown.setdefault(sample.name, set()).add(tuple(sorted(sample.labels)))
    listed = {
        metric.sample: {tuple(sorted(metric.labels))}
        for metric in (*NODE_METRICS, *SESSION_METRICS)
        if metric.sample != CERTIFICATE.sample  # without TLS
    }
    assert shown == listed
    assert not {metric.sample for metric in ENGINE_METRICS} & set(shown)


def test_session_that_replaces_another(node: NodeProcess) -> None:
    """While the old one is being closed, both have the same labels."""
    with closing(ControlClient(node.address, 5)) as client:
        stats = client.stats()
    sessions = [
        SessionStats("e", 0, 10 + each, 1, 1, 1, [], SessionCounters(), "", 0, "", each)
        for each in (1, 2, 0)
    ]
    both = msgspec.structs.replace(stats, sessions=sessions)
    registry = CollectorRegistry()
    registry.register(StatsCollector(lambda: {"10.0.0.1:1": both}))
    labels = {"node": stats.node.name, "engine": "e", "tp_rank": "0"}
    name = "attn_offload:memory_node_kv_blocks"
    assert generate_latest(registry).decode().count(f"\n{name}{{") == 1
    assert registry.get_sample_value(name, labels) == 12


def test_nodes_that_are_gone_are_let_go(node: NodeProcess, silent: list[str]) -> None:
    """Also while threads come and go with clients of other nodes."""
    nodes = dict.fromkeys((node.address, *silent), NO_CREDENTIALS)
    with closing(NodeStatsReader(lambda: nodes)) as reader:
        assert eventually(lambda: reader.read()[node.address], 30)
        for _ in range(20):
            nodes = {f"127.0.0.1:{port}": NO_CREDENTIALS for port in range(1, 64)}
            assert set(reader.read().values()) == {None}
            nodes = {}
            assert reader.read() == {}
        assert not reader._clients


def test_an_older_engine_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that makes engine after engine keeps the descriptors of one."""
    monkeypatch.setenv(ENGINE_BOARD_VARIABLE, "")  # restored with what is set now
    board = EngineBoard.create()
    config = AttentionOffloadConfig(memory_nodes=["127.0.0.1:1"])
    num_open = []
    for _ in range(3):
        export_node_metrics(VllmConfig(), config)
        num_open.append(len(os.listdir("/proc/self/fd")))
    assert num_open[0] == num_open[-1]
    drop_exported()
    assert len(os.listdir("/proc/self/fd")) < num_open[0]
    board.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        board.read()


@pytest.mark.parametrize("cpus", ["shared", "divided"])
def test_placement(node: NodeProcess, cpus: str) -> None:
    """CPUs of the node, and those that a worker of its host says to have."""
    own = max(os.sched_getaffinity(0))
    workers = [0, 1, 2, own] if cpus == "shared" else [own + 1, own + 2, own + 9]
    texts = [attached(node, offer) for offer in (None, ChannelOffer(workers, 1, False))]
    assert "placement_info{" not in texts[0]
    (line,) = (x for x in texts[1].splitlines() if x.startswith("attn_offload:placem"))
    assert line.endswith("} 1.0")
    assert f'cpus="{cpus}"' in line
    assert f'node_cpus="{own}"' in line
    assert f'worker_cpus="{format_cpu_list(workers)}"' in line


def attached(node: NodeProcess, offer: ChannelOffer | None) -> str:
    """Metrics of a node while a worker with such an offer is attached."""
    geometry = make_geometry()
    registry = CollectorRegistry()
    reader = reader_of(node.address)
    registry.register(StatsCollector(reader.read))
    with closing(reader), closing(ControlClient(node.address, 5)) as control:
        reserved = control.reserve(reservation(geometry, 1 << 20))
        opened = control.open_session(session_of(reserved.reservation, 4))
        attach = msgspec.structs.replace(attach_request(opened, geometry), offer=offer)
        sock, _ = connect(node.address, 5)
        with sock:
            call(sock, node.address, attach, Attached, 5)
            texts = [""]
            # A host that is busy may not let the node answer within a second.
            assert eventually(
                lambda: (
                    texts.append(generate_latest(registry).decode())
                    or "kv_blocks{" in texts[-1]
                ),
                30,
            )
            return texts[-1]
