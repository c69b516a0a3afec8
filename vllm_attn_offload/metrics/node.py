# SPDX-License-Identifier: Apache-2.0
"""Metrics of memory nodes. ``attn_offload:`` and not ``vllm:``, because vLLM
unregisters every collector with its own prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric

from vllm_attn_offload.metrics.metric import OffloadMetric
from vllm_attn_offload.protocol.messages import PROTOCOL_VERSION, Stats

#: What a node may be doing.
NODE_STATES = ("starting", "serving", "stopping")
_PREFIX = "attn_offload:memory_node"
_NODE = ("node",)

UP = OffloadMetric(
    f"{_PREFIX}_up",
    "gauge",
    _NODE,
    "1 if the memory node answered within a second, else 0.",
    "bool",
)
INFO = OffloadMetric(
    f"{_PREFIX}_info",
    "info",
    ("node", "address", "version", "protocol", "device", "kernel", "isa"),
    "Where the memory node listens, what it runs, and what it attends with.",
    "info",
)
STATE = OffloadMetric(
    f"{_PREFIX}_state",
    "gauge",
    ("node", "state"),
    "1 for what the memory node is doing, 0 for the other states.",
    "bool",
)
CERTIFICATE = OffloadMetric(
    f"{_PREFIX}_certificate_expiry_seconds",
    "gauge",
    _NODE,
    "Unix time at which the node's certificate expires; absent without TLS, or where "
    "the date cannot be read.",
    "timestamp",
    "certificate_expires",
)
_FIELDS = (
    OffloadMetric(
        f"{_PREFIX}_uptime_seconds",
        "gauge",
        _NODE,
        "Time since the memory node began to serve.",
        "seconds",
        "uptime_s",
    ),
    OffloadMetric(
        f"{_PREFIX}_kv_bytes_budget",
        "gauge",
        _NODE,
        "Bytes that the memory node has for KV blocks of all engines.",
        "bytes",
        "node.kv_bytes_total",
    ),
    OffloadMetric(
        f"{_PREFIX}_kv_bytes_free",
        "gauge",
        _NODE,
        "Bytes of the node's KV budget that no engine holds.",
        "bytes",
        "node.kv_bytes_free",
    ),
    OffloadMetric(
        f"{_PREFIX}_connections",
        "gauge",
        _NODE,
        "Open connections of engines, workers and readers of statistics.",
        "count",
        "num_connections",
    ),
    OffloadMetric(
        f"{_PREFIX}_frame_bytes_budget",
        "gauge",
        _NODE,
        "Bytes that the memory node has for frames and plans of all engines.",
        "bytes",
        "frame_bytes_total",
    ),
    OffloadMetric(
        f"{_PREFIX}_frame_bytes_free",
        "gauge",
        _NODE,
        "Bytes of the node's budget for frames and plans that no engine holds.",
        "bytes",
        "frame_bytes_free",
    ),
    OffloadMetric(
        f"{_PREFIX}_refused",
        "counter",
        ("node", "reason"),
        "Connections and requests that the memory node refused.",
        "count",
        "refused",
    ),
    OffloadMetric(
        f"{_PREFIX}_invalid_frames",
        "counter",
        ("node", "reason"),
        "Frames that broke the protocol; the connection ends with the first.",
        "count",
        "invalid_frames",
    ),
    OffloadMetric(
        f"{_PREFIX}_minor_page_faults",
        "counter",
        _NODE,
        "Memory that the node's process touched for the first time since it serves, in "
        "pages.",
        "count",
        "num_minor_faults",
    ),
    OffloadMetric(
        f"{_PREFIX}_major_page_faults",
        "counter",
        _NODE,
        "Pages that the node's process waited for a disk for since it serves.",
        "count",
        "num_major_faults",
    ),
)
NODE_METRICS = (UP, INFO, STATE, CERTIFICATE, *_FIELDS)


def node_families(
    stats: Mapping[str, Stats], addresses: Mapping[str, str]
) -> Iterator[Metric]:
    """Yield the families of nodes that answered.

    Args:
        stats: What each said, by its label.
        addresses: Where each listens, by its label.
    """
    yield INFO.of_samples(
        (
            (
                name,
                addresses[name],
                each.node.version,
                str(PROTOCOL_VERSION),
                each.node.device,
                each.node.attention_kernel,
                each.node.isa,
            ),
            1,
        )
        for name, each in stats.items()
    )
    yield CERTIFICATE.of_sources(
        ((name,), each) for name, each in stats.items() if each.certificate_expires
    )
    sources = [((name,), each) for name, each in stats.items()]
    for metric in _FIELDS:
        yield metric.of_sources(sources)


def state_family(states: Mapping[str, str]) -> Metric:
    """Return what nodes are doing, by label, one sample per state that there is."""
    return STATE.of_samples(
        ((name, state), now == state)
        for name, now in states.items()
        for state in NODE_STATES
    )
