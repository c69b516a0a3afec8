# SPDX-License-Identifier: Apache-2.0
"""Probes and preStop of the chart, and compose's health check, on a real node."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from harness.processes import free_port
from helm_chart import DEPLOY, NAMESPACE, container_of, needs_helm, pod_of, rendered
from node_container import NodeContainer, on_this_host
from node_process import eventually

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.transport.trust import Credentials

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
TOKEN = "0123456789abcdef0123456789abcdef"
WAIT_S = 4


@pytest.fixture
def container(tmp_path: Path) -> NodeContainer:
    """Of a pod with a token."""
    values = {
        "port": free_port(),
        "metricsPort": free_port(),
        "kvCacheGib": 0.25,
        "preStopWaitSeconds": WAIT_S,
        "auth": {"existingSecret": "token"},
    }
    options = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    objects = rendered("--set-json", ",".join(options))
    assert pod_of(objects)["terminationGracePeriodSeconds"] > WAIT_S
    spec = container_of(objects)
    (mount,) = spec["volumeMounts"]
    secret = Path(f"{tmp_path}{mount['mountPath']}")
    secret.mkdir(parents=True)
    (secret / "token").touch(mode=0o600)
    (secret / "token").write_text(TOKEN)
    return NodeContainer(spec, tmp_path)


@pytest.fixture
def node(container: NodeContainer) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the container, which serves."""
    with container.running() as process:
        assert container.passes_in_time("startupProbe")
        yield process


def client_of(container: NodeContainer) -> ControlClient:
    """What an engine with the same Secret opens."""
    (mount,) = container.spec["volumeMounts"]
    token = f"{container.directory}{mount['mountPath']}/token"
    address = f"127.0.0.1:{container.ports['attention']}"
    return ControlClient(address, 5, Credentials(token))


@needs_helm
def test_probes_follow_the_node(container: NodeContainer) -> None:
    """They fail before it runs, pass while it serves, and fail when it is gone."""
    assert not any(map(container.passes, PROBES))
    with container.running() as node:
        assert container.passes_in_time("startupProbe")
        assert all(map(container.passes, PROBES))
        with closing(client_of(container)) as client:
            assert client.info.name == f"{NAMESPACE}/memory-nodes-0"
        node.send_signal(signal.SIGTERM)
        assert node.wait(10) == 0
    assert not any(map(container.passes, PROBES))


@needs_helm
def test_not_ready_while_memory_is_taken(container: NodeContainer) -> None:
    """Liveness passes from the moment that the port is there."""
    container.spec["args"] = [
        re.sub("=0.25$", "=4", each) for each in container.spec["args"]
    ]
    with container.running() as node:
        assert eventually(lambda: container.passes("livenessProbe"), 20)
        assert not container.passes("readinessProbe")
        assert not container.passes("startupProbe")
        node.send_signal(signal.SIGTERM)
        assert node.wait(30) == 0


@needs_helm
def test_pre_stop_does_not_wait_for_nobody(
    container: NodeContainer, node: subprocess.Popen[bytes]
) -> None:
    assert container.pre_stop().wait(WAIT_S) == 0
    assert node.poll() is None


@needs_helm
def test_pre_stop_waits_for_engines(
    container: NodeContainer, node: subprocess.Popen[bytes]
) -> None:
    """It ends when the last one has gone, and at its deadline where one stays."""
    with closing(client_of(container)):
        started = time.monotonic()
        assert container.pre_stop().wait(2 * WAIT_S) == 0
        assert time.monotonic() - started > WAIT_S - 1
        hook = container.pre_stop()
        assert not eventually(lambda: hook.poll() is not None, 1)
    assert hook.wait(WAIT_S) == 0
    assert node.poll() is None


@needs_helm
def test_health_check_of_the_composition(
    container: NodeContainer, node: subprocess.Popen[bytes]
) -> None:
    """It passes while the node serves."""
    text = (DEPLOY / "examples" / "docker-compose.yml").read_text()
    service = yaml.safe_load(text)["services"]["node-1"]
    kind, *test = service["healthcheck"]["test"]
    assert kind == "CMD"
    port = str(container.ports["metrics"])
    command = [each.replace("9600", port) for each in on_this_host(test)]
    assert subprocess.run(command).returncode == 0
    node.send_signal(signal.SIGTERM)
    assert node.wait(10) == 0
    assert subprocess.run(command, capture_output=True).returncode == 1
