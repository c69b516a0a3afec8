# SPDX-License-Identifier: Apache-2.0
"""Numbers and names as people read them, safe for a terminal."""

from __future__ import annotations

import math

from vllm_attn_offload.printable import printable
from vllm_attn_offload.protocol.byte_size import byte_size

NONE = "–"
_MAX_NAME_CHARS = 60


def name_cell(text: str) -> str:
    """A peer's text: escaped, and short enough for a table."""
    shown = printable(text)
    if len(shown) > _MAX_NAME_CHARS:
        return f"{shown[: _MAX_NAME_CHARS - 1]}…"
    return shown or NONE


def id_cell(text: str) -> str:
    """A generated name: its beginning and end, which tell it from others."""
    shown = name_cell(text)
    return f"{shown[:10]}…{shown[-6:]}" if len(shown) > 18 else shown


def count_cell(count: float) -> str:
    """A count with three digits and more: ``1,234``, ``123 k``, ``12.3 M``."""
    if not math.isfinite(count):
        return NONE
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e5, "k")):
        if abs(count) >= unit:
            divisor = 1e3 if name == "k" else unit
            digits = 1 if abs(count) < 100 * divisor else 0
            return f"{count / divisor:,.{digits}f} {name}"
    return f"{count:,.0f}"


def bytes_cell(num_bytes: float) -> str:
    """A size in GiB, MiB or KiB."""
    return byte_size(int(num_bytes)) if math.isfinite(num_bytes) else NONE


def used_cell(used_bytes: int, total_bytes: int) -> str:
    """A size of another one, with one unit where it is the same: ``1 of 4 GiB``."""
    used, total = byte_size(used_bytes), byte_size(total_bytes)
    number, _, unit = used.rpartition(" ")
    if not used_bytes:
        number = "0"
    elif not total.endswith(f" {unit}"):
        number = used
    return f"{number} of {total}"


def share_cell(share: float) -> str:
    """A share in percent, small ones with a digit behind the point."""
    if not math.isfinite(share):
        return NONE
    percent = 100 * share
    return f"{percent:.1f} %" if 0 < percent < 9.95 else f"{percent:.0f} %"


def ping_cell(seconds: float) -> str:
    """A round trip in milliseconds."""
    return f"{seconds * 1e3:.2f} ms"


def duration_cell(seconds: float) -> str:
    """A time with its two largest units."""
    if not math.isfinite(seconds):
        return NONE
    whole = int(seconds)
    for unit, name, smaller, smaller_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {smaller_name}"
    return f"{whole} s"
