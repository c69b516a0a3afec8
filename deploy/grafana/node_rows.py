# SPDX-License-Identifier: Apache-2.0
"""Rows that ask what memory nodes do, and whom they turn away."""

from __future__ import annotations

import queries as q
from panel import FULL_WIDTH, Panel

_ENGINE = "{{model_name}} {{engine_index}}"
_WORKER = f"{_ENGINE} rank {{{{tp_rank}}}}"
_SESSION = f"{{{{node}}}} for {_WORKER}"
_NODE = "{{node}}"

_ATTENDED = q.session_rate("attended_tokens")
_OF_NODES = f"sum by (node, engine, model_name, engine_index) ({_ATTENDED})"
_BY_ENGINE = "by (engine, model_name, engine_index)"
BALANCE = (
    Panel(
        "Attended tokens",
        "Cached tokens that each node reads, all layers together.",
        "suffix: tokens/s",
        {f"sum by (node) ({_ATTENDED})": _NODE},
    ),
    Panel(
        "Imbalance",
        "Tokens of an engine's busiest node by the mean of its nodes. 1 is even; above "
        "1.3 over long, steps wait for one node.",
        "none",
        {f"max {_BY_ENGINE} ({_OF_NODES}) / avg {_BY_ENGINE} ({_OF_NODES})": _ENGINE},
        limit=1.3,
    ),
    Panel(
        "Busy nodes",
        "Of a second, what a node attends and stores for all its sessions.",
        "percentunit",
        {
            f"sum by (node) ({q.session_rate('remote_attention_seconds')})": (
                f"attend {_NODE}"
            ),
            f"sum by (node) ({q.session_rate('remote_store_seconds')})": (
                f"store {_NODE}"
            ),
        },
    ),
)
QUEUEING = (
    Panel(
        "Waiting for turns",
        "Of a second, what the layers of a worker wait for those of other workers on "
        "the same node.",
        "percentunit",
        {q.session_rate("remote_queue_seconds"): _SESSION},
    ),
    Panel(
        "Queueing against attention",
        "Time in the node's queue by time in its kernel. Above 1 engines wait for each "
        "other longer than for their own attention.",
        "none",
        {
            f"sum by (node) ({q.session_rate('remote_queue_seconds')}) / "
            f"sum by (node) ({q.session_rate('remote_attention_seconds')})": _NODE
        },
        limit=1.0,
    ),
    Panel(
        "Connections and sessions",
        "Open connections of a node, and the workers that it serves.",
        "none",
        {
            q.node_value("memory_node_connections"): f"connections {_NODE}",
            "count by (node) (" + q.session_value("memory_node_kv_bytes") + ")": (
                f"sessions {_NODE}"
            ),
        },
    ),
)
WIRE = (
    Panel(
        "To the nodes",
        "Metadata, q, k and v of each worker.",
        "Bps",
        {q.session_rate("bytes_sent"): _SESSION},
    ),
    Panel(
        "From the nodes",
        "Attention output for each worker.",
        "Bps",
        {q.session_rate("bytes_received"): _SESSION},
    ),
    Panel(
        "Memory for frames",
        "What a node may take for frames and plans of all engines, and what is free. A "
        "node without any refuses further sessions.",
        "bytes",
        {
            q.node_value("memory_node_frame_bytes_budget"): f"budget {_NODE}",
            q.node_value("memory_node_frame_bytes_free"): f"free {_NODE}",
        },
    ),
    Panel(
        "Transport of each session",
        "How frames travel; tcp between processes of one host means that neighbours "
        "do not share memory.",
        "none",
        {
            "max by (node, engine, tp_rank, model_name, engine_index, transport) "
            f"({q.SESSION_INFO})": ""
        },
        kind="table",
        width=FULL_WIDTH,
    ),
)
PROCESSES = (
    Panel(
        "Resident memory",
        "Of a node's process, where the node is scraped itself (--metrics-listen).",
        "bytes",
        {q.process_value("resident_memory_bytes"): _NODE},
    ),
    Panel(
        "CPU time",
        "CPUs that a node's process keeps busy, and of them those of the threads that "
        "serve workers.",
        "none",
        {
            q.process_rate("cpu_seconds"): f"all {_NODE}",
            f"sum by (node) ({q.session_rate('remote_cpu_seconds')})": (
                f"serving {_NODE}"
            ),
        },
    ),
    Panel(
        "File descriptors",
        "Open ones of a node's process, and its limit: a connection and its shared "
        "memory take a few.",
        "none",
        {
            q.process_value("open_fds"): f"open {_NODE}",
            q.process_value("max_fds"): f"limit {_NODE}",
        },
    ),
    Panel(
        "Page faults",
        "Memory that is touched for the first time, and pages that were waited for on "
        "a disk, which a node should never have.",
        "suffix: faults/s",
        {
            q.node_rate("memory_node_minor_page_faults"): f"minor {_NODE}",
            q.node_rate("memory_node_major_page_faults"): f"major {_NODE}",
        },
    ),
    Panel(
        "Uptime",
        "Time since the node began to serve.",
        "s",
        {q.node_value("memory_node_uptime_seconds"): _NODE},
        kind="stat",
    ),
    Panel(
        "State",
        "What each node is doing.",
        "none",
        {q.node_value("memory_node_state", by="node, state") + " == 1": "{{state}}"},
        kind="table",
    ),
    Panel(
        "Nodes",
        "What each node runs, and what it attends with.",
        "none",
        {
            "max by (node, version, protocol, device, kernel, isa) "
            f"(attn_offload:memory_node_info{{{q.NODE}}})": ""
        },
        kind="table",
        width=12,
    ),
    Panel(
        "CPUs of neighbours",
        "Of workers and nodes on one host: divided between them, or taken in turns.",
        "none",
        {
            "max by (node, engine, tp_rank, cpus, node_cpus, worker_cpus) "
            f"(attn_offload:placement_info{{{q.NODE}}})": ""
        },
        kind="table",
        width=12,
    ),
)
_REASON = f"{_NODE}: {{{{reason}}}}"
REFUSALS = (
    Panel(
        "Refused connections and requests",
        "By reason: another version, a wrong token, TLS, another user, too many "
        "connections, no room, or a request that is not allowed.",
        "suffix: per s",
        {q.node_rate("memory_node_refused", "node, reason"): _REASON},
    ),
    Panel(
        "Invalid frames",
        "Frames that broke the protocol, by what was wrong. The node hung up on each: "
        "of engines of the same version there are none.",
        "suffix: per s",
        {q.node_rate("memory_node_invalid_frames", "node, reason"): _REASON},
    ),
    Panel(
        "Certificates expire in",
        "Of nodes with TLS. They read new files at every connection.",
        "s",
        {
            q.node_value("memory_node_certificate_expiry_seconds", take="min")
            + " - time()": _NODE
        },
        kind="stat",
        floor=14 * 86400,
    ),
)
