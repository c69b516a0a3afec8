# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus on another host scrapes real nodes and a real engine under load.

Then a node dies, a standby takes its place, and every query of dashboard and alerts
must have data.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from certificates import Authority
from harness import faults, tiny_llama
from harness.network_hosts import network_hosts
from harness.processes import free_port
from harness.serve_process import ServeProcess
from node_process import NodeProcess, eventually
from prometheus_server import PrometheusServer
from queries import Query, alert_queries, dashboard_queries

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.transport.trust import Credentials

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus"),
]

NUM_TOKENS = 100
#: Under load, before a node dies and after its loss.
LOAD_S = 8.0
#: Of rates: at least two scrapes, and no older than the load.
WINDOW = "8s"


@dataclass
class Observed:
    """What was scraped.

    Attributes:
        prometheus: The server, which still runs.
        healthy_s: Unix time near the end of the load before the loss.
        ended_s: Near the end of the load after it.
    """

    prometheus: PrometheusServer
    healthy_s: float
    ended_s: float


class Nodes:
    """Two nodes to use, a standby, and one that nobody uses, with a certificate."""

    def __init__(self, address: str, directory: Path, cpu: str) -> None:
        self.metrics = [f"{address}:{free_port()}" for _ in range(4)]
        self.token_file = directory / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text("0123456789abcdef" * 4)
        identity = Authority(directory).sign("node", f"IP:{address}")
        tcp = f"{address}:0"
        self.running = [
            NodeProcess(
                listen,
                directory / f"node-{index}.log",
                *("--name", f"node-{index}", "--metrics-listen", self.metrics[index]),
                *("--kv-cache-gib", "0.05", "--cpus", cpu),
                *("--auth-token-file", str(self.token_file), *options),
            )
            for index, (listen, *options) in enumerate(
                [
                    (f"unix:{directory / 'node.sock'}", "--listen", tcp),
                    (tcp,),
                    (tcp,),
                    (tcp, *identity.options),
                ]
            )
        ]

    def refuse_peer(self) -> None:
        """Come to the standby with another token."""
        with pytest.raises(MemoryNodeError, match="token"):
            ControlClient(self.running[2].address, 5, Credentials(token=b"f" * 64))

    def kill(self) -> None:
        """End all."""
        for node in self.running:
            node.kill()


def answer_for(server: ServeProcess, duration_s: float) -> None:
    """Keep the server busy."""
    deadline = time.monotonic() + duration_s
    while time.monotonic() < deadline:
        prompts = tiny_llama.PROMPTS
        faults.Streams(server.url, server.model, prompts, NUM_TOKENS).finish(60)


@pytest.fixture(scope="module")
def observed(
    tiny_model: str, node_cpu: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observed]:
    """Load, the loss of a node, and load again."""
    directory = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as stack:
        try:
            (host,) = stack.enter_context(network_hosts(1))
        except PermissionError as error:
            pytest.skip(str(error))
        ours = re.sub(r"\d+$", "1", host.address)
        nodes = Nodes(ours, directory, node_cpu)
        stack.callback(nodes.kill)
        first, second, standby, _ = (node.address for node in nodes.running)
        offload = {
            "memory_nodes": [first, second],
            "standby_nodes": [standby],
            "auth_token_file": str(nodes.token_file),
        }
        server = ServeProcess(
            tiny_model,
            directory / "serve.log",
            *("--attention-offload", "--attention-offload-config"),
            *(json.dumps(offload), "--enforce-eager", "--dtype", "float32"),
            *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN), "--host", ours),
            host=ours,
        )
        stack.callback(server.kill_all)
        targets = {
            "vllm": [server.url.removeprefix("http://")],
            "memory-nodes": nodes.metrics,
        }
        prometheus = PrometheusServer(host, directory, targets)
        stack.callback(prometheus.kill)
        answer_for(server, LOAD_S)
        healthy_s = time.time() - 1
        nodes.refuse_peer()
        nodes.running[1].kill()
        answer_for(server, LOAD_S)
        ended_s = time.time() - 1
        eventually(lambda: prometheus.query("max(scrape_samples_scraped)"), 5)
        yield Observed(prometheus, healthy_s, ended_s)


@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda query: query.place)
def test_panel_has_data(observed: Observed, query: Query) -> None:
    found = observed.prometheus.query(query.concrete(WINDOW), observed.ended_s)
    assert found
    assert not all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("query", alert_queries(), ids=lambda query: query.place)
def test_alert_has_data(observed: Observed, query: Query) -> None:
    """Whatever it is compared with: without a reason to fire there would be none."""
    compared = re.sub(r"\s(==|>|<)\s", r" \1 bool ", query.concrete())
    assert compared != query.expression
    assert observed.prometheus.query(compared, observed.ended_s)


def test_every_target_is_scraped(observed: Observed) -> None:
    up = observed.prometheus.query("up", observed.healthy_s)
    assert list(up.values()) == [1.0] * 5


def test_nodes_have_their_names(observed: Observed) -> None:
    """On the engine's metrics and on their own, also after one was lost."""
    query = 'min by (node) (attn_offload:memory_node_up{job=~"$job"})'
    seen = Query("", query).concrete()
    before = observed.prometheus.query(seen, observed.healthy_s)
    after = observed.prometheus.query(seen, observed.ended_s)
    assert before == {f'{{"node": "node-{index}"}}': 1.0 for index in range(4)}
    assert after == before | {'{"node": "node-1"}': 0.0}


def test_alerts_name_the_loss_and_the_stranger(observed: Observed) -> None:
    alerts = observed.prometheus.alerts()
    assert alerts["NodeDown"]["state"] in ("pending", "firing")
    assert alerts["RefusedPeers"]["state"] == "firing"
    refused = alerts["RefusedPeers"]["annotations"]["summary"]
    assert refused == ("node-2 refused connections in the last ten minutes (token).")
    for alert in alerts.values():
        for text in alert["annotations"].values():
            assert "<no value>" not in text
            assert "error" not in text
