# SPDX-License-Identifier: Apache-2.0
"""``/metrics``, ``/healthz`` and ``/readyz`` of a node, over HTTP."""

from __future__ import annotations

import http.server
import logging
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from socket import socket
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from vllm_attn_offload.memory_node.connections import strangers
from vllm_attn_offload.memory_node.node_state import NodeState
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.control import hang_up

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 16
_PAUSE_TIMEOUT_S = 5.0
_ACCEPT_RETRY_S = 0.2
#: For so long everybody is shown the same metrics: whoever asks without a pause must
#: not take the interpreter from engines.
_METRICS_AGE_S = 0.5
_TEXT = "text/plain; charset=utf-8"


class HealthServer:
    """Answers GET and HEAD in the background, from the moment it is made.

    ``/healthz`` is 200 while the process lives, ``/readyz`` while it serves, else 503;
    its text is the state. ``/metrics`` is up to half a second old. A client that is
    slow loses its connection where a new one needs room, so nobody keeps probes out.

    Args:
        address: HOST:PORT.
        registry: What ``/metrics`` shows.

    Attributes:
        address: ``address`` with the port that was bound.
        read_state: Returns what the node does.

    Raises:
        OSError: The address cannot be bound.
    """

    def __init__(self, address: Address, registry: CollectorRegistry) -> None:
        self.read_state: Callable[[], NodeState] = lambda: NodeState.STARTING
        self._registry = registry
        self._metrics = b""
        self._collected = -_METRICS_AGE_S
        self._lock = threading.Lock()
        sock = address.listen()
        self.address = Address(address.host, sock.getsockname()[1])
        server = _Server(sock, self._answer)
        threading.Thread(
            target=server.serve_forever, name="health", daemon=True
        ).start()

    def _answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, content type and body."""
        match path.partition("?")[0]:
            case "/metrics":
                # Never OpenMetrics, which Prometheus asks for: in that format
                # prometheus_client 0.26 makes an underscore of the colon in names.
                return 200, CONTENT_TYPE_LATEST, self._current_metrics()
            case "/healthz":
                return 200, _TEXT, b"alive\n"
            case "/readyz":
                state = self.read_state()
                is_ready = state is NodeState.SERVING
                return 200 if is_ready else 503, _TEXT, f"{state.value}\n".encode()
            case _:
                return 404, _TEXT, b"Allowed: /metrics, /healthz and /readyz.\n"

    def _current_metrics(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._collected >= _METRICS_AGE_S:
                self._metrics = generate_latest(self._registry)
                self._collected = time.monotonic()
            return self._metrics


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = _PAUSE_TIMEOUT_S
    server_version, sys_version = "vllm-memory-node", ""

    def do_GET(self) -> None:
        status, content_type, body = self.server.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s asked: %s", self.client_address[0], format % args)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(
        self, sock: socket, answer: Callable[[str], tuple[int, str, bytes]]
    ) -> None:
        super().__init__(sock.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.answer = answer
        self._open: list[socket] = []
        self._num_served = 0
        self._room = threading.Condition()
        self._is_short = False

    def get_request(self) -> tuple[Any, Any]:
        with self._room:
            # Those that made room are still served until their thread notices.
            self._room.wait_for(lambda: self._num_served < 2 * _MAX_CONNECTIONS)
        try:
            return super().get_request()
        except OSError as error:
            self._wait_for_more(error)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._room:
            if len(self._open) >= _MAX_CONNECTIONS:
                hang_up(self._open.pop(0))
            self._open.append(request)
            self._num_served += 1
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:
            self._wait_for_more(error)
            self.shutdown_request(request)
        else:
            self._is_short = False

    def close_request(self, request: Any) -> None:
        with self._room:
            if request in self._open:
                self._open.remove(request)
            self._num_served -= 1
            self._room.notify()
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            logger.debug("a connection of %s ended: %s", client_address[0], error)
        else:
            strangers.warning(
                "a request of %s failed", client_address[0], exc_info=error
            )

    def _wait_for_more(self, error: Exception) -> None:
        """Pause where descriptors or threads ran out, while clients go on waiting."""
        if not self._is_short:
            logger.warning("cannot answer probes for now: %s", error)
        self._is_short = True
        time.sleep(_ACCEPT_RETRY_S)
