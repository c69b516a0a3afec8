# SPDX-License-Identifier: Apache-2.0
"""Keeps a peer from forging lines of the log, or from writing to a terminal."""

from __future__ import annotations

import logging
import traceback


class EscapeFilter(logging.Filter):
    """Shows what is not printable as an escape sequence, in every record.

    Tracebacks keep their lines, each behind a bar: none looks like a record.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape the record's text; every record passes."""
        record.msg, record.args = _escaped(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            lines = "".join(traceback.format_exception(*record.exc_info)).split("\n")
            record.exc_text = "\n".join(f"  | {_escaped(line)}" for line in lines)
        return True


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in text
    )
