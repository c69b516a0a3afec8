# SPDX-License-Identifier: Apache-2.0
"""When offloaded generation counts as equal to stock vLLM's."""

from __future__ import annotations

from typing import Any

Completion = dict[str, Any]

MAX_LOGPROB_DIFFERENCE = 1e-3
# One to two bf16 ulps of this model's logits: rounding decides between such tokens.
MAX_BF16_GAP = 0.25
MIN_BF16_IDENTICAL = 0.8


def assert_identical(stock: list[Completion], offload: list[Completion]) -> None:
    """fp32: every token is equal and its log-probability within 1e-3."""
    assert len(stock) == len(offload)
    for index, (ours, theirs) in enumerate(zip(offload, stock, strict=True)):
        assert ours["tokens"] == theirs["tokens"], f"sequence {index}"
    worst = max(
        abs(a - b)
        for ours, theirs in zip(offload, stock, strict=True)
        for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True)
    )
    assert worst <= MAX_LOGPROB_DIFFERENCE


def bf16_gaps(stock: list[Completion], offload: list[Completion]) -> list[float]:
    """Stock's top-two gap at the first differing token of each differing sequence."""
    gaps = []
    for ours, theirs in zip(offload, stock, strict=True):
        pairs = zip(ours["tokens"], theirs["tokens"], theirs["gaps"], strict=True)
        gap = next((gap for a, b, gap in pairs if a != b), None)
        if gap is not None:
            gaps.append(gap)
    return gaps


def assert_close_bf16(stock: list[Completion], offload: list[Completion]) -> str:
    """bf16: sequences part only where rounding decides, and most never do.

    Returns:
        The counts and every gap, for the report.
    """
    gaps = bf16_gaps(stock, offload)
    identical = len(stock) - len(gaps)
    report = (
        f"bf16: {identical}/{len(stock)} sequences identical; stock's top-two gap "
        f"where the others part: {[round(gap, 4) for gap in gaps]}"
    )
    assert all(gap <= MAX_BF16_GAP for gap in gaps), report
    assert identical >= MIN_BF16_IDENTICAL * len(stock), report
    return report
