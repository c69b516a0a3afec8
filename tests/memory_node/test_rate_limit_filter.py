# SPDX-License-Identifier: Apache-2.0
"""A peer cannot fill the log."""

from __future__ import annotations

import logging

from vllm_attn_offload.memory_node.rate_limit_filter import RateLimitFilter


def record(number: int, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("name", level, "path", 1, "line %d", (number,), None)


def test_burst_then_few() -> None:
    now = 0.0
    limit = RateLimitFilter(burst=3, per_s=20, clock=lambda: now)
    assert [limit.filter(record(n)) for n in range(6)].count(True) == 3
    assert limit.filter(record(0, logging.ERROR))
    now += 0.1
    following = record(7)
    assert limit.filter(following)
    assert following.getMessage() == "line 7 (3 lines before were dropped)"
    last = record(8)
    limit.filter(last)
    assert last.getMessage() == "line 8"
