# SPDX-License-Identifier: Apache-2.0
"""Spans of attention offloading in the traces that vLLM writes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.tracing import init_tracer

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer
    from vllm.config import VllmConfig

#: All names of spans and attributes begin with it.
_PREFIX = "attn_offload."
Attributes = Mapping[str, str | int | float | Sequence[str]]


class Spans:
    """Writes spans with the tracer that vLLM set up in this process.

    Names and keys of attributes are given without ``attn_offload.``.

    Args:
        tracer: One of vLLM's provider.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @classmethod
    def of_engine(cls, vllm_config: VllmConfig) -> Spans | None:
        """Return None where ``--otlp-traces-endpoint`` was not given."""
        endpoint = vllm_config.observability_config.otlp_traces_endpoint
        if endpoint is None:
            return None
        from opentelemetry import trace

        provider = trace.get_tracer_provider()
        # Engines behind several API servers, and Ray's workers, are started by
        # processes that set none up.
        if isinstance(provider, trace.ProxyTracerProvider):
            init_tracer(__name__, endpoint)
        return cls(trace.get_tracer(__name__))

    @contextmanager
    def around(self, name: str, attributes: Attributes) -> Iterator[None]:
        """Write a span of the block, in the span that is open here."""
        with self._tracer.start_as_current_span(
            _PREFIX + name, attributes=_full(attributes)
        ):
            yield

    def write(
        self,
        name: str,
        began_s: float,
        ended_s: float,
        attributes: Attributes,
        *,
        parent: Context | None = None,
        error: str = "",
    ) -> Context:
        """Write a span that is over; times are ``time.monotonic``.

        Args:
            name: Without the prefix.
            began_s: When it began.
            ended_s: When it ended.
            attributes: Without the prefix.
            parent: Context of the span that it is a part of; None: it begins a trace.
            error: Why what it stands for failed; "": it did not.

        Returns:
            The context in which its parts are written.
        """
        from opentelemetry import trace
        from opentelemetry.context import Context as NoContext

        epoch_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            _PREFIX + name,
            context=NoContext() if parent is None else parent,
            start_time=epoch_ns + int(began_s * 1e9),
            attributes=_full(attributes),
        )
        if error:
            span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        span.end(epoch_ns + int(ended_s * 1e9))
        return trace.set_span_in_context(span, NoContext())


def _full(attributes: Attributes) -> dict[str, str | int | float | Sequence[str]]:
    return {_PREFIX + key: value for key, value in attributes.items()}
