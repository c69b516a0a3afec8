# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload status`: its options, one look, and looks again and again."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_attn_offload.seconds_option import seconds
from vllm_attn_offload.status.lines import report_lines
from vllm_attn_offload.status.look_taker import LookTaker
from vllm_attn_offload.trust_options import add_trust_options, given_credentials

if TYPE_CHECKING:
    from vllm_attn_offload.status.report import Report

STATUS_HELP = "show memory nodes, their sessions and what they do"
_EPILOG = """examples:
  vllm-attn-offload status 10.0.0.7:7600 10.0.0.8:7600 --auth-token-file token
  vllm-attn-offload status --engine http://localhost:8000 --watch
  vllm-attn-offload status unix:/run/vllm-memory-node.sock --json
The exit status is 1 where a node or the engine does not answer, and 2 where the command
is wrong. Not on a terminal, every node, session and engine is one plain line."""


def add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "status",
        help=STATUS_HELP,
        description=STATUS_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "addresses",
        nargs="*",
        metavar="ADDRESS",
        help="of a memory node: HOST:PORT, [IPV6]:PORT or unix:PATH",
    )
    parser.add_argument(
        "--engine",
        default="",
        metavar="URL",
        help="of a server with attention offloading, whose /metrics name its nodes",
    )
    parser.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="look again and again, and show rates (default: every 2 s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, a line, per look"
    )
    parser.add_argument(
        "--timeout-s",
        type=_seconds,
        default=2.0,
        metavar="S",
        help="deadline for all answers of a look together (default: %(default)g)",
    )
    add_trust_options(parser)


def run_status(args: argparse.Namespace) -> int:
    """Look and show; returns 1 where the last look missed a node or the engine.

    Raises:
        ValueError: Nothing to look at was given, or an address, the URL or a file of
            the credentials is wrong.
    """
    taker = LookTaker(
        args.addresses, args.engine, given_credentials(args), args.timeout_s
    )
    reports = _looks(taker, args.watch)
    # The end of a terminal's display restores what was there before.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = 0
    try:
        for report in _shown(reports, args):
            status = report.exit_status
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # Whoever read has enough; Python would complain when it flushes at exit.
        sys.stdout = None
    return status


def _looks(taker: LookTaker, interval_s: float | None) -> Iterator[Report]:
    is_watching = interval_s is not None
    while True:
        started = time.monotonic()
        yield taker.look(has_rates=is_watching)
        if interval_s is None:
            return
        time.sleep(max(started + interval_s - time.monotonic(), 0.0))


def _shown(reports: Iterator[Report], args: argparse.Namespace) -> Iterator[Report]:
    if args.json or not sys.stdout.isatty():
        yield from _shown_as_lines(reports, args)
        return
    # Only a terminal needs it.
    from rich.console import Console
    from rich.live import Live

    from vllm_attn_offload.status.tables import report_tables

    console = Console(highlight=False, markup=False, emoji=False)
    if args.watch is None:
        for report in reports:
            console.print(report_tables(report))
            yield report
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for report in reports:
            live.update(report_tables(report), refresh=True)
            yield report


def _shown_as_lines(
    reports: Iterator[Report], args: argparse.Namespace
) -> Iterator[Report]:
    for number, report in enumerate(reports):
        if args.json:
            text = json.dumps(report.document())
        else:
            # An empty line between looks.
            text = "\n" * bool(number) + "\n".join(report_lines(report))
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        yield report


def _seconds(text: str) -> float:
    return seconds(
        text, "Write addresses before this option, and for example --watch 2."
    )
