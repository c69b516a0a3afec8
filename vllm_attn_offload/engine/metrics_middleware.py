# SPDX-License-Identifier: Apache-2.0
"""ASGI middleware of vLLM's API servers: our metrics on ``/metrics`` of any of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from vllm_attn_offload.engine.node_metrics import register_exported

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_PATHS = ("/metrics", "/metrics/")


class MetricsMiddleware:
    """Answers ``/metrics`` where several API servers share their numbers by files.

    vLLM then shows a registry of its own that holds those files only
    (vllm/v1/metrics/prometheus.py). Every other request is the application's.

    Args:
        app: Application that is wrapped.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""
        if scope["type"] == "http" and "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path in _PATHS and scope["method"] == "GET":
                # Nodes are asked, and files are read.
                text = await run_in_threadpool(_all_metrics)
                response = Response(text, media_type=CONTENT_TYPE_LATEST)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _all_metrics() -> bytes:
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    registry = get_prometheus_registry()  # a new one, as vLLM's own answer has
    register_exported(registry)
    return generate_latest(registry)
