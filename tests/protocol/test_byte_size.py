# SPDX-License-Identifier: Apache-2.0
"""Sizes of memory as people read them."""

from __future__ import annotations

import pytest

from vllm_attn_offload.protocol.byte_size import byte_size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (63, "63 bytes"),
        (3 << 10, "3.00 KiB"),
        (10 << 20, "10.00 MiB"),
        (int(0.1 * (1 << 30)), "0.10 GiB"),
        (3 << 30, "3.00 GiB"),
    ],
)
def test_byte_size(num_bytes: int, text: str) -> None:
    assert byte_size(num_bytes) == text
