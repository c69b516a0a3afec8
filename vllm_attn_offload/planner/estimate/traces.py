# SPDX-License-Identifier: Apache-2.0
"""Request traces in the public Azure (CSV) and Mooncake (JSONL) formats."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class Request:
    """One request: arrival in seconds from the first, prompt and generated tokens."""

    arrival_s: float
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """Means of a trace, in tokens; `context` weighs a request by its decode steps."""

    num_requests: int
    prompt: float
    output: float
    context: float


def read_trace(path: Path) -> list[Request]:
    """Requests of a trace by arrival; those that generate nothing are dropped.

    Args:
        path: Azure's `TIMESTAMP,ContextTokens,GeneratedTokens` CSV
            (github.com/Azure/AzurePublicDataset) or Mooncake's JSON lines with
            `timestamp` in ms, `input_length` and `output_length`
            (github.com/kvcache-ai/Mooncake).

    Raises:
        ValueError: Missing file or another format.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            rows = list(_mooncake(file) if first.startswith("{") else _azure(file))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"Cannot read trace {path}: {error!r}. Allowed: CSV with the columns "
            f"{', '.join(AZURE_COLUMNS)}, or JSON lines with "
            f"{', '.join(MOONCAKE_KEYS)}. Check the path and the format."
        ) from error
    rows = sorted((r for r in rows if r[2] > 0), key=lambda row: row[0])
    if not rows:
        raise ValueError(
            f"Trace {path} has no request that generates a token. At least one is "
            "needed. Use another file."
        )
    start = rows[0][0]
    return [Request(at - start, prompt, output) for at, prompt, output in rows]


def _azure(lines: Iterator[str]) -> Iterator[tuple[float, int, int]]:
    at, prompt, output = AZURE_COLUMNS
    for row in csv.DictReader(lines):
        # Seven fractional digits, one more than fromisoformat takes.
        seconds, _, fraction = row[at].partition(".")
        stamp = datetime.fromisoformat(seconds + "+00:00").timestamp()
        stamp += float(f"0.{fraction[:6] or 0}")
        yield stamp, int(row[prompt]), int(row[output])


def _mooncake(lines: Iterator[str]) -> Iterator[tuple[float, int, int]]:
    at, prompt, output = MOONCAKE_KEYS
    for line in lines:
        row = json.loads(line)
        yield float(row[at]) / 1000, int(row[prompt]), int(row[output])


def summarize(requests: Sequence[Request]) -> TraceSummary:
    """Means of `requests`.

    A request with prompt p and g generated tokens runs g decode steps over p, p+1, ...,
    p+g-1 cached tokens: g (p + (g-1)/2) token reads.
    """
    steps = sum(r.output for r in requests)
    reads = sum(r.output * (r.prompt + (r.output - 1) / 2) for r in requests)
    count = len(requests)
    return TraceSummary(
        num_requests=count,
        prompt=sum(r.prompt for r in requests) / count,
        output=steps / count,
        context=reads / steps,
    )
