# SPDX-License-Identifier: Apache-2.0
"""What an API server answers while engines have no KV pool."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from vllm_attn_offload.engine.outage_board import OutageBoard
from vllm_attn_offload.engine.outage_middleware import OutageMiddleware
from vllm_attn_offload.engine.outage_notice import Outage

COMPLETIONS, TOKENIZE = "/v1/completions", "/tokenize"


async def answer(request: Request) -> Response:
    return PlainTextResponse("answered")


@pytest.fixture
def board() -> OutageBoard:
    """That of a deployment with two engines."""
    board = OutageBoard.create()
    for engine in range(2):
        board.write(engine, None)
    return board


@pytest.fixture
def client(board: OutageBoard) -> Iterator[TestClient]:
    routes = [
        Route("/health", answer),
        Route(COMPLETIONS, answer, methods=["POST"]),
        Route(TOKENIZE, answer, methods=["POST"]),
        Route("/metrics", answer),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(OutageMiddleware)])
    with TestClient(app) as client:
        yield client


def outage(grace_s: float) -> Outage:
    now = time.monotonic()
    return Outage("10.0.0.1:7600", "it was lost.", now, now + grace_s, now + 100.0)


def test_all_is_well(client: TestClient) -> None:
    assert client.get("/health").text == "answered"
    assert client.post(COMPLETIONS).text == "answered"


def test_health_says_at_once_which_node_is_away(
    client: TestClient, board: OutageBoard
) -> None:
    """Requests wait: most nodes are back within seconds."""
    board.write(1, outage(grace_s=1000.0))
    health = client.get("/health")
    assert health.status_code == 503
    assert "Memory node 10.0.0.1:7600 is away" in health.json()["error"]["message"]
    assert client.post(COMPLETIONS).status_code == 200
    board.write(1, None)
    assert client.get("/health").status_code == 200


def test_new_requests_are_refused_after_the_grace(
    client: TestClient, board: OutageBoard
) -> None:
    """Those that no engine can take, and only those that need one."""
    board.write(0, outage(grace_s=0.0))
    assert client.post(COMPLETIONS).status_code == 200
    board.write(1, outage(grace_s=0.0))
    refused = client.post(COMPLETIONS)
    assert refused.status_code == 503
    assert 1 <= int(refused.headers["Retry-After"]) <= 10
    assert "it was lost." in refused.json()["error"]["message"]
    assert client.post(TOKENIZE).status_code == 200
    assert client.get("/metrics").status_code == 200


def test_long_reasons_are_cut(client: TestClient, board: OutageBoard) -> None:
    board.write(0, Outage("node", "\N{SNOWMAN}" * 5000, 0.0, 0.0, 0.0))
    assert client.get("/health").status_code == 503
