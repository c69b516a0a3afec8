# SPDX-License-Identifier: Apache-2.0
"""A report as plain lines for files and pipes: two blanks between fields."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_attn_offload.printable import printable
from vllm_attn_offload.protocol.session_stats import SessionStats
from vllm_attn_offload.status.cells import (
    bytes_cell,
    count_cell,
    duration_cell,
    name_cell,
    ping_cell,
    share_cell,
    used_cell,
)
from vllm_attn_offload.status.engine_row import EngineRow
from vllm_attn_offload.status.node_report import NodeReport
from vllm_attn_offload.status.rates import Rates
from vllm_attn_offload.status.report import Report


def report_lines(report: Report) -> Iterator[str]:
    """One line for every node, session, engine and note."""
    for node in report.nodes:
        yield "  ".join(_node_fields(node))
    for node in report.nodes:
        for session, rates in node.sessions():
            yield "  ".join(_session_fields(node, session, rates))
    for row in report.engine.engines if report.engine else []:
        yield "  ".join(_engine_fields(row))
    for note in (report.imbalance_note(), *report.problems()):
        if note:
            yield f"note  {note}"


def _node_fields(node: NodeReport) -> Iterator[str]:
    yield f"node {name_cell(node.look.name)}"
    yield printable(node.look.address)
    yield node.look.state
    if (stats := node.stats) is None:
        return
    info = stats.node
    yield f"version {name_cell(info.version)}"
    yield f"{name_cell(info.device)} {name_cell(info.attention_kernel)}"
    yield f"KV {used_cell(node.kv_bytes_held, info.kv_bytes_total)}"
    yield f"sessions {len(stats.sessions)}"
    yield from _activity(node)
    yield f"up {duration_cell(stats.uptime_s)}"
    yield f"ping {ping_cell(node.look.ping_s)}"


def _activity(node: NodeReport) -> Iterator[str]:
    if (rates := node.rates) is None:
        yield f"attended {count_cell(node.total('num_attended_tokens'))}"
        yield f"in {bytes_cell(node.total('bytes_received'))}"
        yield f"out {bytes_cell(node.total('bytes_sent'))}"
        return
    yield f"attended {count_cell(rates.attended_tokens_per_s)}/s"
    yield f"busy {share_cell(rates.busy)}"
    yield f"queue {share_cell(rates.queue)}"
    yield f"receive {share_cell(rates.receive)}"
    yield f"in {bytes_cell(rates.bytes_in_per_s)}/s"
    yield f"out {bytes_cell(rates.bytes_out_per_s)}/s"


def _session_fields(
    node: NodeReport, session: SessionStats, rates: Rates | None
) -> Iterator[str]:
    yield f"session {name_cell(session.engine)}"
    yield f"model {name_cell(session.model)}"
    yield f"index {session.engine_index}"
    yield f"rank {session.tp_rank}"
    yield f"node {name_cell(node.look.name)}"
    yield f"transport {name_cell(session.transport)}"
    yield f"blocks {session.num_blocks:,}"
    yield f"KV {bytes_cell(session.kv_bytes)}"
    yield f"generation {session.generation}"
    if rates is None:
        yield f"attended {count_cell(session.counters.num_attended_tokens)}"
    else:
        yield f"attended {count_cell(rates.attended_tokens_per_s)}/s"
        yield f"worker waits {share_cell(rates.worker_wait)}"


def _engine_fields(row: EngineRow) -> Iterator[str]:
    yield f"engine {name_cell(row.engine_index)}"
    yield f"model {name_cell(row.model_name)}"
    if row.recovering:
        yield "recovering"
    for label, number in (
        ("generation", row.generation),
        ("recoveries", row.recoveries),
        ("recomputed tokens", row.recomputed_tokens),
        ("pool blocks", row.pool_blocks),
    ):
        if number is not None:
            yield f"{label} {count_cell(number)}"
    if row.last_recovery_s:
        yield f"last recovery {row.last_recovery_s:.1f} s"
