# SPDX-License-Identifier: Apache-2.0
"""A report as tables of rich, for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from vllm_attn_offload.protocol.session_stats import SessionStats
from vllm_attn_offload.status.cells import (
    NONE,
    bytes_cell,
    count_cell,
    duration_cell,
    id_cell,
    name_cell,
    ping_cell,
    share_cell,
    used_cell,
)
from vllm_attn_offload.status.engine_row import EngineRow
from vllm_attn_offload.status.fitted_table import FittedTable
from vllm_attn_offload.status.node_report import NodeReport
from vllm_attn_offload.status.rates import Rates
from vllm_attn_offload.status.report import Report, clock

_STATE_STYLES = {"serving": "green", "refuses": "yellow", "no answer": "bold red"}
_BAR_CHARS = 14
#: Columns that a narrow terminal goes without, the first ones first.
_OPTIONAL_OF_NODES = ("kernel\nISA", "receive", "in/s\nout/s", "up\nping", "queue")
_OPTIONAL_OF_SESSIONS = ("transport", "generation", "blocks", "KV", "model")
_OPTIONAL_OF_ENGINES = (
    *("recomputed tokens", "generation", "last recovery", "pool blocks"),
)


def report_tables(report: Report) -> RenderableType:
    """Problems, nodes, their sessions, engines, and the imbalance."""
    # A screen cuts what is below its height.
    problems = (Text(f"  {each}") for each in report.problems())
    parts: list[RenderableType] = [_title(report), *problems, _nodes(report)]
    sessions = [
        (node, session, rates)
        for node in report.nodes
        for session, rates in node.sessions()
    ]
    if sessions:
        parts.append(_sessions(sessions, has_rates=report.has_rates))
    if report.engine and report.engine.engines:
        parts.append(_engines(report.engine.engines))
    if note := report.imbalance_note():
        parts.append(Text(f"  {note}"))
    return Group(*parts)


def _title(report: Report) -> Text:
    num_serving = sum(each.stats is not None for each in report.nodes)
    title = Text(f"  {num_serving} of {len(report.nodes)} memory nodes serve", "bold")
    return title.append(f"   {clock(report.unix_time)}", "not bold dim")


def _nodes(report: Report) -> FittedTable:
    if report.has_rates:
        activity: tuple[str, ...] = (
            "attended/s",
            "busy",
            "queue",
            "receive",
            "in/s\nout/s",
        )
    else:
        activity = ("attended", "in\nout")
    numbers = (*activity, "up\nping")
    columns = ("node\naddress", "state\nversion", "kernel\nISA", "KV memory")
    table = FittedTable((*columns, *numbers), numbers, _OPTIONAL_OF_NODES)
    for node in report.nodes:
        look = node.look
        name = _stacked(look.name, look.address if look.stats else "")
        state = Text(look.state, _STATE_STYLES[look.state])
        if (stats := node.stats) is None:
            table.add_row(name, state)
            continue
        state.append(f"\n{name_cell(stats.node.version)}", "dim")
        table.add_row(
            name,
            state,
            _stacked(f"{stats.node.device} {node.look.kernel}", stats.node.isa),
            _memory(node),
            *_activity(node, has_rates=report.has_rates),
            f"{duration_cell(stats.uptime_s)}\n{ping_cell(look.ping_s)}",
        )
    return table


def _memory(node: NodeReport) -> Group:
    assert node.stats is not None
    total = node.stats.node.kv_bytes_total
    held = min(max(node.kv_bytes_held, 0), total)
    text = used_cell(held, total)
    return Group(Text(text), ProgressBar(total or 1, held, width=_BAR_CHARS))


def _activity(node: NodeReport, *, has_rates: bool) -> tuple[str, ...]:
    if not has_rates:
        return (
            count_cell(node.total("num_attended_tokens")),
            f"{bytes_cell(node.total('bytes_received'))}\n"
            f"{bytes_cell(node.total('bytes_sent'))}",
        )
    if (rates := node.rates) is None:
        return (NONE,) * 5
    return (
        count_cell(rates.attended_tokens_per_s),
        share_cell(rates.busy),
        share_cell(rates.queue),
        share_cell(rates.receive),
        f"{bytes_cell(rates.bytes_in_per_s)}\n{bytes_cell(rates.bytes_out_per_s)}",
    )


def _sessions(
    rows: list[tuple[NodeReport, SessionStats, Rates | None]], *, has_rates: bool
) -> FittedTable:
    activity = ("attended/s", "worker waits") if has_rates else ("attended",)
    numbers = ("rank", "generation", "blocks", "KV", *activity)
    columns = ("engine", "model", "node", "transport", *numbers)
    table = FittedTable(columns, numbers, _OPTIONAL_OF_SESSIONS)
    shown = None
    rows.sort(key=lambda row: (row[1].engine, row[1].tp_rank))
    for node, session, rates in rows:
        is_first, shown = session.engine != shown, session.engine
        named = (id_cell(session.engine), name_cell(session.model))
        engine, model = named if is_first else ("", "")
        table.add_row(
            *map(Text, (engine, model, name_cell(node.look.name))),
            Text(name_cell(session.transport)),
            str(session.tp_rank),
            str(session.generation),
            f"{session.num_blocks:,}",
            bytes_cell(session.kv_bytes),
            *_session_activity(session, rates, has_rates=has_rates),
        )
    return table


def _session_activity(
    session: SessionStats, rates: Rates | None, *, has_rates: bool
) -> tuple[str, ...]:
    if not has_rates:
        return (count_cell(session.counters.num_attended_tokens),)
    if rates is None:
        return NONE, NONE
    return count_cell(rates.attended_tokens_per_s), share_cell(rates.worker_wait)


def _engines(rows: list[EngineRow]) -> FittedTable:
    numbers = (
        *("engine", "pool blocks", "generation", "recoveries", "last recovery"),
        "recomputed tokens",
    )
    table = FittedTable(("model", *numbers, "state"), numbers, _OPTIONAL_OF_ENGINES)
    for row in rows:
        last = row.last_recovery_s
        state = Text("recovering", "bold red") if row.recovering else Text("")
        table.add_row(
            Text(name_cell(row.model_name)),
            Text(name_cell(row.engine_index)),
            _count(row.pool_blocks),
            _count(row.generation),
            _count(row.recoveries),
            f"{last:.1f} s" if last else NONE,
            _count(row.recomputed_tokens),
            state,
        )
    return table


def _count(number: float | None) -> str:
    return NONE if number is None else count_cell(number)


def _stacked(first: str, second: str) -> Text:
    """Two lines of a cell, as text: a node's markup is none."""
    text = Text(name_cell(first))
    if second and second != first:
        text.append(f"\n{name_cell(second)}", "dim")
    return text
