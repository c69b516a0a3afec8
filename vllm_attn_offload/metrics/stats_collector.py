# SPDX-License-Identifier: Apache-2.0
"""Shows memory nodes, on their own ``/metrics`` and on vLLM's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from vllm_attn_offload.metrics.node import UP, node_families, state_family
from vllm_attn_offload.metrics.session import session_families
from vllm_attn_offload.protocol.messages import Stats


class StatsCollector(Collector):
    """Turns node statistics into metric families whenever Prometheus scrapes.

    A node is labelled with its name; with its address until it first answers, and
    where another node has the same name.

    Args:
        read_stats: Returns the current statistics by node address; None of a node that
            does not answer.
        read_states: Returns what nodes are doing, by address; None: those that answer
            serve.
    """

    def __init__(
        self,
        read_stats: Callable[[], Mapping[str, Stats | None]],
        read_states: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        self._read_stats = read_stats
        self._read_states = read_states
        self._names: dict[str, str] = {}

    def describe(self) -> list[Metric]:
        """Nothing: registering must not contact a node."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield one family per metric."""
        answers = self._read_stats()
        labels = self._labels(answers)
        yield UP.of_samples(
            ((labels[address],), answer is not None)
            for address, answer in answers.items()
        )
        stats = {labels[each]: answer for each, answer in answers.items() if answer}
        states = dict.fromkeys(stats, "serving")
        if self._read_states is not None:
            known = self._read_states()
            states = {labels[each]: known[each] for each in answers if each in known}
        yield state_family(states)
        yield from node_families(stats, {name: each for each, name in labels.items()})
        yield from session_families(stats)

    def _labels(self, answers: Mapping[str, Stats | None]) -> dict[str, str]:
        for address, answer in answers.items():
            if answer is not None:
                self._names[address] = answer.node.name
        names = {address: self._names.get(address, address) for address in answers}
        counts = Counter(names.values())
        return {
            address: name if counts[name] == 1 else address
            for address, name in names.items()
        }
