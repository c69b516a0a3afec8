# SPDX-License-Identifier: Apache-2.0
"""An endpoint for traces, as a collector of OpenTelemetry has one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class SpanReceiver(ThreadingHTTPServer):
    """Keeps every span that it is sent over OTLP/HTTP.

    ``variables`` let vLLM send there soon, over this protocol.
    """

    variables = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1/traces"
        self.spans: list[Span] = []

    def named(self, name: str) -> list[Span]:
        """Spans of a name, in the order in which they came."""
        return [span for span in list(self.spans) if span.name == name]

    def children(self, parent: Span) -> dict[str, Span]:
        """Spans in a span, by their names."""
        return {
            span.name: span
            for span in list(self.spans)
            if span.parent_span_id == parent.span_id
            and span.trace_id == parent.trace_id
        }


@contextmanager
def span_receiver() -> Iterator[SpanReceiver]:
    """A receiver that runs."""
    with SpanReceiver() as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield receiver
        receiver.shutdown()


def attributes(span: Span) -> dict[str, Any]:
    """What a span says of itself."""
    return {each.key: _value(each.value) for each in span.attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return list(map(_value, value.array_value.values))
    return getattr(value, kind)


class _Handler(BaseHTTPRequestHandler):
    server: SpanReceiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing: pytest would show it."""
