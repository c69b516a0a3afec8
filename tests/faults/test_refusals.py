# SPDX-License-Identifier: Apache-2.0
"""What a node says before it closes a channel reaches a worker that still sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from certificates import Authority
from node_process import NodeProcess
from raw_session import attach_request, make_geometry, reservation, session_of

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.errors import NodeDefectError
from vllm_attn_offload.transport.streams import LONGEST_LINGER_S
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

StartNode = Callable[..., NodeProcess]
REFUSAL = "layer 0 of step 1 before its STEP frame"
TIMEOUT_S = 10.0


@pytest.fixture(params=["shared memory", "tcp", "tls"])
def client(
    request: pytest.FixtureRequest, start_node: StartNode, tmp_path: Path
) -> Iterator[NodeClient]:
    """A session's data channel, with none of its steps described to the node."""
    credentials, options = NO_CREDENTIALS, []
    address = "127.0.0.1:0"
    if request.param == "tls":
        authority: Authority = request.getfixturevalue("authority")
        options = authority.sign("node", "IP:127.0.0.1").options
        identity = authority.sign("engine", "DNS:engine")
        credentials = Credentials("", identity.cert, identity.key, identity.ca)
    elif request.param == "shared memory":
        address = f"unix:{tmp_path / 'node.sock'}"
    node = start_node(address, *options)
    geometry = make_geometry()
    with closing(ControlClient(node.address, 5, credentials)) as control:
        reserved = control.reserve(reservation(geometry, 1 << 20))
        opened = control.open_session(session_of(reserved.reservation, 8))
        attach = attach_request(opened, geometry)
        with closing(NodeClient(node.address, attach, TIMEOUT_S, credentials)) as made:
            yield made


def send_layers(client: NodeClient) -> None:
    """More of them than sockets and slots hold."""
    rows = memoryview(bytearray(1 << 20))
    for _ in range(64):
        client.post_layer(1, 0, 0, 0, rows, has_queries=True)
    client.receive_out(0, rows)


def test_refused_while_sending(client: NodeClient) -> None:
    with pytest.raises(NodeDefectError, match=REFUSAL):
        send_layers(client)


@pytest.mark.parametrize("client", ["tcp"], indirect=True)
def test_refused_before_sending(client: NodeClient) -> None:
    """The node has said so, and does not listen any more."""
    client.post_layer(1, 0, 0, 0, memoryview(b""), has_queries=True)
    time.sleep(LONGEST_LINGER_S + 1)
    with pytest.raises(NodeDefectError, match=REFUSAL):
        send_layers(client)
