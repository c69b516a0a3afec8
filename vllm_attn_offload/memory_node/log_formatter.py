# SPDX-License-Identifier: Apache-2.0
"""Keeps a peer from forging lines of the log, or from writing to a terminal."""

from __future__ import annotations

import logging
from typing import Any


class LogFormatter(logging.Formatter):
    """Shows what is not printable as an escape sequence, in every record.

    Tracebacks keep their lines, each behind a bar: none looks like a record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Format all but the traceback."""
        return _escaped(super().formatMessage(record))

    def formatException(self, *arguments: Any) -> str:  # noqa: N802
        """Format a traceback."""
        lines = super().formatException(*arguments).split("\n")
        return "\n".join(f"  | {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in text
    )
