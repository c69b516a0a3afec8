# SPDX-License-Identifier: Apache-2.0
"""Metrics of sessions: what one worker of an engine holds and does on one node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import Metric

from vllm_attn_offload.cpu_list import format_cpu_list
from vllm_attn_offload.metrics.metric import Kind, OffloadMetric, Unit
from vllm_attn_offload.protocol.messages import SessionStats, Stats

_LABELS = ("node", "engine", "tp_rank")
_INFO = OffloadMetric(
    "attn_offload:session_info",
    "info",
    (*_LABELS, "engine_index", "model_name", "transport"),
    "What the session serves, and how its frames travel.",
    "info",
)
_PLACEMENT = OffloadMetric(
    "attn_offload:placement_info",
    "info",
    (*_LABELS, "cpus", "node_cpus", "worker_cpus"),
    "CPUs of a memory node and of a worker on its host: shared, or divided.",
    "info",
)
# Name, help, unit, field of SessionStats.
_FIELDS: tuple[tuple[Kind, str, str, Unit, str], ...] = (
    (
        "gauge",
        "memory_node_kv_blocks",
        "KV blocks that the memory node holds for the engine.",
        "count",
        "num_blocks",
    ),
    (
        "gauge",
        "memory_node_kv_bytes",
        "Bytes of KV blocks that the memory node holds for the engine.",
        "bytes",
        "kv_bytes",
    ),
    (
        "gauge",
        "compute_worker_kv_bytes",
        "Bytes of KV cache that the compute worker allocated.",
        "bytes",
        "worker_kv_bytes",
    ),
    (
        "gauge",
        "compute_worker_state_bytes",
        "Bytes of recurrent states that the compute worker allocated.",
        "bytes",
        "worker_state_bytes",
    ),
    (
        "counter",
        "bytes_sent",
        "Bytes of metadata and q, k, v that the compute node sent.",
        "bytes",
        "counters.bytes_received",
    ),
    (
        "counter",
        "bytes_received",
        "Bytes of attention output that the compute node received.",
        "bytes",
        "counters.bytes_sent",
    ),
    (
        "counter",
        "steps",
        "Scheduler steps that were served.",
        "count",
        "counters.num_steps",
    ),
    (
        "counter",
        "layer_calls",
        "Attention calls (one per layer and step).",
        "count",
        "counters.num_layer_calls",
    ),
    (
        "counter",
        "attended_tokens",
        "Cached tokens that attention read, in every layer. Compare between nodes.",
        "count",
        "counters.num_attended_tokens",
    ),
    (
        "counter",
        "remote_attention_seconds",
        "Time the memory node spent in its attention kernel.",
        "seconds",
        "counters.attend_s",
    ),
    (
        "counter",
        "remote_store_seconds",
        "Time the memory node spent on storing k and v.",
        "seconds",
        "counters.store_s",
    ),
    (
        "counter",
        "remote_plan_seconds",
        "Time the memory node spent on checking and planning steps.",
        "seconds",
        "counters.plan_s",
    ),
    (
        "counter",
        "remote_layer_seconds",
        "Time from a layer's arrival to the end of its answer.",
        "seconds",
        "counters.layer_s",
    ),
    (
        "counter",
        "remote_cpu_seconds",
        "CPU time of the memory node's thread that serves the worker.",
        "seconds",
        "counters.cpu_s",
    ),
    (
        "counter",
        "remote_queue_seconds",
        "Time that layers waited for those of other sessions on the memory node.",
        "seconds",
        "counters.queue_s",
    ),
    (
        "counter",
        "remote_receive_wait_seconds",
        "Time the memory node waited for payloads of layers that had begun to arrive.",
        "seconds",
        "counters.receive_s",
    ),
    (
        "counter",
        "remote_send_seconds",
        "Time the memory node spent on sending attention output.",
        "seconds",
        "counters.send_s",
    ),
    (
        "counter",
        "compute_pack_seconds",
        "Time the worker spent on gathering q, k and v to send to all its nodes.",
        "seconds",
        "counters.worker_pack_s",
    ),
    (
        "counter",
        "compute_send_seconds",
        "Time the worker spent on sending steps and layers to all its nodes.",
        "seconds",
        "counters.worker_send_s",
    ),
    (
        "counter",
        "compute_wait_seconds",
        "Time the worker waited for attention output of all its nodes.",
        "seconds",
        "counters.worker_wait_s",
    ),
)
_METRICS = tuple(
    OffloadMetric(f"attn_offload:{name}", kind, _LABELS, text, unit, field)
    for kind, name, text, unit, field in _FIELDS
)
SESSION_METRICS = (_INFO, _PLACEMENT, *_METRICS)


def session_families(stats: Mapping[str, Stats]) -> Iterator[Metric]:
    """Yield the families of all sessions on these nodes, by their label."""
    sessions = [
        (labels, session)
        for name, each in stats.items()
        for labels, session in _newest(name, each.sessions).items()
    ]
    yield _INFO.of_samples(
        ((*labels, str(each.engine_index), each.model, each.transport), 1)
        for labels, each in sessions
    )
    yield _PLACEMENT.of_samples(
        ((*labels, *_cpus(stats[labels[0]].cpu_ids, each.worker_cpu_ids)), 1)
        for labels, each in sessions
        if each.worker_cpu_ids
    )
    for metric in _METRICS:
        yield metric.of_sources(sessions)


def _newest(
    node: str, sessions: Sequence[SessionStats]
) -> dict[tuple[str, str, str], SessionStats]:
    """Sessions by their labels, which those that are just being closed share."""
    return {
        (node, session.engine, str(session.tp_rank)): session
        for session in sorted(sessions, key=lambda each: each.generation)
    }


def _cpus(ours: Sequence[int], theirs: Sequence[int]) -> tuple[str, str, str]:
    """CPUs as both sides have them, whoever chose them."""
    is_divided = set(ours).isdisjoint(theirs)
    how = "divided" if is_divided else "shared"
    return how, format_cpu_list(ours), format_cpu_list(theirs)
