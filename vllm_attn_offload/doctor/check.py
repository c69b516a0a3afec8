# SPDX-License-Identifier: Apache-2.0
"""Checks that run at the same time, none of which can end or delay the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from vllm_attn_offload.doctor.finding import Finding

_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at.

    Attributes:
        subject: What it belongs to: this host, a memory node, the model, the engine.
        name: In one or two words.
        run: Yields what it finds.
        deadline_s: Seconds that it may take from the start of all checks.
    """

    subject: str
    name: str
    run: Callable[[], Iterable[Finding]]
    deadline_s: float = 30.0


def in_background(work: Callable[[], _ResultT]) -> Future[_ResultT]:
    """Start work in a thread that does not keep the process from ending."""
    future: Future[_ResultT] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def run_checks(checks: Sequence[Check]) -> Iterator[tuple[Check, list[Finding]]]:
    """Start all checks, and yield what they found in their order, as they end.

    What goes wrong in a check is a finding itself, behind those that it made before.
    """
    start = time.monotonic()
    running: list[tuple[Check, list[Finding], Future[None]]] = []
    for each in checks:
        found: list[Finding] = []
        running.append((each, found, in_background(partial(_collect, each, found))))
    for check, found, future in running:
        left_s = start + check.deadline_s - time.monotonic()
        try:
            future.result(max(0.0, left_s))
        except TimeoutError:
            yield check, [*found, _late(check)]
        else:
            yield check, found


def _collect(check: Check, found: list[Finding]) -> None:
    try:
        for finding in check.run():
            found.append(finding)  # at once: a late check is shown as far as it came
    except Exception as error:
        found.append(
            Finding.fail(
                check.name,
                f"this check itself failed: {type(error).__name__}: {error}",
                "a check that ends with a finding",
                "Report it with this line; the other checks are not touched by it.",
            )
        )


def _late(check: Check) -> Finding:
    return Finding.fail(
        check.name,
        f"no answer within {check.deadline_s:g} s",
        f"an answer within {check.deadline_s:g} s",
        "Look whether the host is busy or its name server silent, or raise "
        "--timeout-s.",
    )
