# SPDX-License-Identifier: Apache-2.0
"""Text of peers in logs and on terminals."""

from __future__ import annotations


def printable(text: str) -> str:
    """Write what is not printable as an escape sequence; the rest stays."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in text
    )
