# SPDX-License-Identifier: Apache-2.0
"""A table that leaves columns out where a terminal has no room for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import (
    Console,
    ConsoleOptions,
    JustifyMethod,
    RenderableType,
    RenderResult,
)
from rich.measure import Measurement
from rich.table import Table

#: Wider than any table, whose own width is asked for.
_UNLIMITED = 10_000


class FittedTable:
    """Whole columns, as many as there is room for.

    Args:
        columns: Headers.
        numbers: Those of columns that are justified to the right.
        optional: Those of columns that may be left out, the first one first.
    """

    def __init__(
        self,
        columns: Sequence[str],
        numbers: Collection[str],
        optional: Sequence[str],
    ) -> None:
        self._columns = columns
        self._numbers = numbers
        self._optional = optional
        self._rows: list[dict[str, RenderableType]] = []

    def add_row(self, *cells: RenderableType) -> None:
        """Add a row; cells that are missing at its end are empty."""
        self._rows.append(dict(zip(self._columns, cells, strict=False)))

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Show what fits; without all optional columns the rest is cut."""
        table = self._without([])
        for count in range(1, len(self._optional) + 1):
            if self._width(console, options, table) <= options.max_width:
                break
            table = self._without(self._optional[:count])
        yield table

    def _without(self, left_out: Collection[str]) -> Table:
        shown = [column for column in self._columns if column not in left_out]
        table = Table(box=SIMPLE_HEAD, header_style="bold", collapse_padding=True)
        for column in shown:
            justify: JustifyMethod = "right" if column in self._numbers else "left"
            table.add_column(column, justify=justify, no_wrap=True)
        for row in self._rows:
            table.add_row(*(row.get(column, "") for column in shown))
        return table

    @staticmethod
    def _width(console: Console, options: ConsoleOptions, table: Table) -> int:
        unlimited = options.update(max_width=_UNLIMITED)
        return Measurement.get(console, unlimited, table).maximum
