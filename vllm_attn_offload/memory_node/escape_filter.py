# SPDX-License-Identifier: Apache-2.0
"""Keeps a peer from forging lines of the log, or from writing to a terminal."""

from __future__ import annotations

import logging
import traceback

from vllm_attn_offload.printable import printable


class EscapeFilter(logging.Filter):
    """Shows what is not printable as an escape sequence, in every record.

    Tracebacks keep their lines, each behind a bar: none looks like a record.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape the record's text; every record passes."""
        record.msg, record.args = printable(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            lines = "".join(traceback.format_exception(*record.exc_info)).split("\n")
            record.exc_text = "\n".join(f"  | {printable(line)}" for line in lines)
        return True
