# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of memory nodes, on the node and on vLLM's own /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from vllm_attn_offload.cpu_list import format_cpu_list
from vllm_attn_offload.protocol.messages import Stats

_SESSION_LABELS = ("node", "engine", "tp_rank")
# Name, help, field of Stats.
_NODE_COUNTERS = (
    (
        "attn_offload:memory_node_minor_page_faults",
        "Memory that the node's process touched for the first time since it serves, in "
        "pages.",
        "num_minor_faults",
    ),
    (
        "attn_offload:memory_node_major_page_faults",
        "Pages that the node's process waited for a disk for since it serves.",
        "num_major_faults",
    ),
)
# Name, help, field of SessionStats. "attn_offload:" and not "vllm:", because vLLM
# unregisters every collector with its own prefix.
_GAUGES = (
    (
        "attn_offload:memory_node_kv_blocks",
        "KV blocks that the memory node holds for the engine.",
        "num_blocks",
    ),
    (
        "attn_offload:memory_node_kv_bytes",
        "Bytes of KV blocks that the memory node holds for the engine.",
        "kv_bytes",
    ),
    (
        "attn_offload:compute_worker_kv_bytes",
        "Bytes of KV cache that the compute worker allocated.",
        "worker_kv_bytes",
    ),
    (
        "attn_offload:compute_worker_state_bytes",
        "Bytes of recurrent states that the compute worker allocated.",
        "worker_state_bytes",
    ),
)
# Name, help, field of SessionCounters.
_COUNTERS = (
    (
        "attn_offload:bytes_sent",
        "Bytes of metadata and q, k, v that the compute node sent.",
        "bytes_received",
    ),
    (
        "attn_offload:bytes_received",
        "Bytes of attention output that the compute node received.",
        "bytes_sent",
    ),
    ("attn_offload:steps", "Scheduler steps that were served.", "num_steps"),
    (
        "attn_offload:layer_calls",
        "Attention calls (one per layer and step).",
        "num_layer_calls",
    ),
    (
        "attn_offload:attended_tokens",
        "Cached tokens that attention read, in every layer. Compare between nodes.",
        "num_attended_tokens",
    ),
    (
        "attn_offload:remote_attention_seconds",
        "Time the memory node spent in its attention kernel.",
        "attend_s",
    ),
    (
        "attn_offload:remote_store_seconds",
        "Time the memory node spent on storing k and v.",
        "store_s",
    ),
    (
        "attn_offload:remote_plan_seconds",
        "Time the memory node spent on checking and planning steps.",
        "plan_s",
    ),
    (
        "attn_offload:remote_layer_seconds",
        "Time from a layer's arrival to the end of its answer.",
        "layer_s",
    ),
    (
        "attn_offload:remote_cpu_seconds",
        "CPU time of the memory node's thread that serves the worker.",
        "cpu_s",
    ),
    (
        "attn_offload:remote_queue_seconds",
        "Time that layers waited for those of other sessions on the memory node.",
        "queue_s",
    ),
)


class StatsCollector(Collector):
    """Turns node statistics into metric families whenever Prometheus scrapes.

    Args:
        read_stats: Returns the current statistics by node address; None of a node that
            does not answer.
    """

    def __init__(self, read_stats: Callable[[], Mapping[str, Stats | None]]) -> None:
        self._read_stats = read_stats

    def describe(self) -> list[Metric]:
        """Nothing: registering must not contact a node."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield one family per metric."""
        answers = self._read_stats()
        up = GaugeMetricFamily(
            "attn_offload:memory_node_up",
            "1 if the memory node answered within a second, else 0.",
            labels=("node",),
        )
        for node, answer in answers.items():
            up.add_metric((node,), answer is not None)
        yield up
        stats = {node: answer for node, answer in answers.items() if answer}
        free = GaugeMetricFamily(
            "attn_offload:memory_node_kv_bytes_free",
            "Bytes of the node's KV budget that no engine holds.",
            labels=("node",),
        )
        for node, node_stats in stats.items():
            free.add_metric((node,), node_stats.node.kv_bytes_free)
        yield free
        for name, text, field in _NODE_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=("node",))
            for node, node_stats in stats.items():
                counter.add_metric((node,), getattr(node_stats, field))
            yield counter
        sessions = [
            ((node, session.engine, str(session.tp_rank)), session)
            for node, node_stats in stats.items()
            for session in node_stats.sessions
        ]
        yield _placement(stats)
        for name, text, field in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=_SESSION_LABELS)
            for labels, session in sessions:
                gauge.add_metric(labels, getattr(session, field))
            yield gauge
        for name, text, field in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_SESSION_LABELS)
            for labels, session in sessions:
                counter.add_metric(labels, getattr(session.counters, field))
            yield counter


def _placement(stats: Mapping[str, Stats]) -> Metric:
    """CPUs as both sides have them, whoever chose them."""
    info = InfoMetricFamily(
        "attn_offload:placement",
        "CPUs of a memory node and of a worker on its host: shared, or divided.",
        labels=_SESSION_LABELS,
    )
    for node, node_stats in stats.items():
        for session in node_stats.sessions:
            ours, theirs = node_stats.cpu_ids, session.worker_cpu_ids
            if theirs:
                is_divided = set(ours).isdisjoint(theirs)
                shown = {
                    "cpus": "divided" if is_divided else "shared",
                    "node_cpus": format_cpu_list(ours),
                    "worker_cpus": format_cpu_list(theirs),
                }
                info.add_metric((node, session.engine, str(session.tp_rank)), shown)
    return info
