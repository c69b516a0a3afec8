# SPDX-License-Identifier: Apache-2.0
"""Lists of CPUs as people write them."""

from __future__ import annotations

import pytest

from vllm_attn_offload.cpu_list import format_cpu_list, parse_cpu_list


@pytest.mark.parametrize(
    ("cpus", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([0, 1], "0-1"),
        ([4, 0, 1, 2, 9, 8, 4], "0-2,4,8-9"),
        (range(128), "0-127"),
    ],
)
def test_ranges(cpus: list[int], text: str) -> None:
    assert format_cpu_list(cpus) == text
    if text:
        assert parse_cpu_list(text) == sorted(set(cpus))
