# SPDX-License-Identifier: Apache-2.0
"""Progress of a long measurement."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich.progress
from rich.console import Console

_Item = TypeVar("_Item")


def track(items: Iterable[_Item], description: str) -> Iterator[_Item]:
    """Yield items: with a bar on a terminal, with a line after each elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from rich.progress.track(items, description, console=console)
        return
    listed, started = list(items), time.monotonic()
    for number, item in enumerate(listed, 1):
        yield item
        seconds = time.monotonic() - started
        print(
            f"{description}: {number} of {len(listed)} after {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
