# SPDX-License-Identifier: Apache-2.0
"""Sizes of memory as people read them."""

from __future__ import annotations


def byte_size(num_bytes: int) -> str:
    """Write a size in GiB, or in a smaller unit where GiB would round to nothing."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(num_bytes) >= unit // 10:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} bytes"
