# SPDX-License-Identifier: Apache-2.0
"""ASGI middleware of vLLM's API server: clients learn that memory nodes are away."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from vllm_attn_offload.engine.outage_board import OutageBoard
from vllm_attn_offload.engine.outage_notice import Outage
from vllm_attn_offload.logger import get_logger

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = get_logger(__name__)

_HEALTH_PATHS = ("/health", "/ping")
#: Requests that no engine sees.
_FRONTEND_PATHS = ("/tokenize", "/detokenize")
_MAX_RETRY_S = 10.0


class OutageMiddleware:
    """Answers 503 while engines have no KV pool, and ends with 1 if one gave up.

    ``/health`` says so at once; new requests are refused after a grace, unless another
    engine can take them. Requests that are running wait for their engine.

    ``--middleware vllm_attn_offload.engine.outage_middleware.OutageMiddleware`` does
    what ``--attention-offload`` does.

    Args:
        app: Application that is wrapped.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._board = OutageBoard.find()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer, or let the application answer."""
        if self._board is None:
            return self._app(scope, receive, send)
        engines = self._board.read()
        if scope["type"] == "lifespan":
            return self._app(scope, self._until_shutdown(receive), send)
        if scope["type"] == "http" and any(engines):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            response = _refusal(scope["method"], path, engines)
            if response is not None:
                return response(scope, receive, send)
        return self._app(scope, receive, send)

    def _until_shutdown(self, receive: Receive) -> Receive:
        async def watched() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self._end_with_failure()
            return message

        return watched

    def _end_with_failure(self) -> None:
        """vLLM ends with status 0 when its engine is dead: nobody would restart it."""
        assert self._board is not None
        for outage in filter(None, self._board.read()):
            if outage.is_final:
                logger.error(
                    "Attention offload: memory node %s: %s The server ends with status "
                    "1.",
                    outage.node,
                    outage.cause,
                )
                asyncio.get_running_loop().call_soon(sys.exit, 1)
                return


def _refusal(
    method: str, path: str, engines: Sequence[Outage | None]
) -> JSONResponse | None:
    """Return the answer to a request, or None where the server may answer it."""
    away = [outage for outage in engines if outage is not None]
    if path in _HEALTH_PATHS:
        return _response(away[0])
    now = time.monotonic()
    is_refused = len(away) == len(engines) and all(
        outage.refuse_from_s <= now for outage in away
    )
    needs_engine = method == "POST" and path not in _FRONTEND_PATHS
    return _response(away[0]) if is_refused and needs_engine else None


def _response(outage: Outage) -> JSONResponse:
    remaining_s = outage.remaining_s()
    message = (
        f"Memory node {outage.node} is away since "
        f"{time.monotonic() - outage.since_s:.0f} s: {outage.cause} The engine waits "
        f"for it for {remaining_s:.0f} s more. Try again later."
    )
    error = {
        "message": message,
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    retry_s = max(1, math.ceil(min(_MAX_RETRY_S, remaining_s)))
    return JSONResponse({"error": error}, 503, {"Retry-After": str(retry_s)})
