# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of two engines: equal, but where rounding decides."""

from __future__ import annotations

from typing import Any

#: A prompt's tokens, each with its lead in log-probability over the second best.
Answer = list[tuple[int, float]]

#: Where stock's lead is no larger an engine may take the other token: one or two units
#: in the last place of this model's logits, as in ``tests/e2e/equality.py``.
MAX_LEAD = {"float32": 0.0, "bfloat16": 0.25, "float16": 0.25}


def answer_of(completion: Any) -> Answer:
    """Tokens and leads of vLLM's output, made with ``logprobs=2``."""
    answer = []
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        others = [each.logprob for key, each in entries.items() if key != token]
        answer.append((token, entries[token].logprob - max(others)))
    return answer


def leads_where_parted(stock: list[Answer], other: list[Answer]) -> list[float]:
    """Stock's lead at the first differing token of each sequence that differs."""
    leads = []
    for ours, theirs in zip(other, stock, strict=True):
        pairs = zip(ours, theirs, strict=True)
        lead = next((b[1] for a, b in pairs if a[0] != b[0]), None)
        if lead is not None:
            leads.append(lead)
    return leads
