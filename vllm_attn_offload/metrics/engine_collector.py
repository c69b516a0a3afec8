# SPDX-License-Identifier: Apache-2.0
"""Shows engines on vLLM's own ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from vllm_attn_offload.metrics.engine import engine_families
from vllm_attn_offload.metrics.engine_state import EngineState


class EngineCollector(Collector):
    """Turns the states of engines into metric families whenever Prometheus scrapes.

    Args:
        read_states: Returns the current state of every engine.
    """

    def __init__(self, read_states: Callable[[], Iterable[EngineState]]) -> None:
        self._read_states = read_states

    def describe(self) -> list[Metric]:
        """Nothing: no engine has shown its state when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield one family per metric."""
        return engine_families(self._read_states())
