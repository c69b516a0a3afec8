# SPDX-License-Identifier: Apache-2.0
"""What `calibrate` does at the moment: a bar on a terminal, else a line per step."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class StepProgress:
    """Shows steps as they begin, for as long as its context lasts.

    Args:
        num_steps: Of the whole run.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_begun = 0
        self._started = time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns) if sys.stdout.isatty() else None
        self._task = self._bar.add_task("", total=num_steps) if self._bar else None

    def __enter__(self) -> StepProgress:
        """Start the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete the bar, and leave it as far as it came where something failed."""
        if self._bar is not None and self._task is not None:
            if error is None:
                self._bar.update(self._task, completed=self._num_steps)
            self._bar.stop()

    def begin(self, title: str) -> None:
        """Show that the next step begins, and that those before it are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=title, completed=self._num_begun)
        self._num_begun += 1
        if self._bar is None:
            # Not among the results, and at once also where a file is written.
            print(
                f"calibrate: step {self._num_begun} of {self._num_steps}, after "
                f"{time.monotonic() - self._started:.0f} s: {title}",
                file=sys.stderr,
                flush=True,
            )
