# SPDX-License-Identifier: Apache-2.0
"""Shows findings as they come, in a terminal or as plain lines, and the verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.text import Text

from vllm_attn_offload.doctor.check import Check
from vllm_attn_offload.doctor.finding import Finding, Severity
from vllm_attn_offload.printable import printable

_MARKS: dict[Severity, tuple[str, str]] = {
    "ok": ("ok  ", "green"),
    "warn": ("WARN", "yellow"),
    "fail": ("FAIL", "bold red"),
}
_NAME_WIDTH = 14


class Report:
    """Collects findings; a context in which a terminal shows what is awaited.

    Args:
        is_json: Print one JSON list at the end instead.
    """

    def __init__(self, is_json: bool) -> None:
        self._is_json = is_json
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._found: list[tuple[str, Finding]] = []
        self._status = self._console.status("looking")

    def __enter__(self) -> Report:
        if self._console.is_terminal and not self._is_json:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()

    def await_check(self, check: Check | None) -> None:
        """Name the check that is awaited next."""
        if check is not None:
            self._status.update(f"{check.subject}: {check.name}")

    def add(self, subject: str, findings: Sequence[Finding]) -> None:
        """Show what a check found."""
        for finding in findings:
            if not self._is_json:
                self._show(subject, finding)
            self._found.append((subject, finding))

    @property
    def num_fails(self) -> int:
        """Findings with which it would not serve."""
        return sum(finding.severity == "fail" for _, finding in self._found)

    def close(self) -> int:
        """Print the verdict; returns the exit status."""
        severities = [finding.severity for _, finding in self._found]
        num_fails, num_warns = self.num_fails, severities.count("warn")
        if self._is_json:
            document = [
                {"subject": subject} | dataclasses.asdict(finding)
                for subject, finding in self._found
            ]
            self._print(Text(json.dumps(document, indent=2)))
        else:
            verdict = "It would not serve" if num_fails else "It would serve"
            style = _MARKS["fail" if num_fails else "ok"][1]
            counts = f"{num_fails} failed, {num_warns} warned, {len(severities)} in all"
            self._print(Text(f"\n{verdict}: {counts}.", style))
        return 1 if num_fails else 0

    def _show(self, subject: str, finding: Finding) -> None:
        if not self._found or self._found[-1][0] != subject:
            self._print(Text(subject, "bold"))
        mark, style = _MARKS[finding.severity]
        line = Text("  ")
        line.append(mark, style)
        line.append(f" {finding.check:{_NAME_WIDTH}} {printable(finding.found)}")
        self._print(line)
        indent = " " * (8 + _NAME_WIDTH)
        for part, text in (("Allowed", finding.allowed), ("Do", finding.do)):
            if text:
                self._print(Text(f"{indent}{part}: {printable(text)}"))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)
