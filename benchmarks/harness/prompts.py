# SPDX-License-Identifier: Apache-2.0
"""Prompts that a small model continues surely.

A prompt repeats a phrase of its own, which the model then goes on with: its choices are
sure, and a wrong output shows rather than a tie that rounding decides.
"""

from __future__ import annotations

from pathlib import Path

PHRASE_TOKENS = 8
#: Very short, and around block boundaries (128).
LENGTHS = (
    *(1, 2, 15, 33, 64, 100, 110, 127, 128, 129),
    *(130, 140, 150, 160, 200, 240, 255, 256, 257),
)


def draw(model: str) -> list[list[int]]:
    """Token ids of one prompt of each of `LENGTHS`."""
    texts = phrases_of(model, len(LENGTHS))
    return [repeated(text, size) for text, size in zip(texts, LENGTHS, strict=True)]


def phrases_of(model: str, count: int) -> list[list[int]]:
    """Token ids of different phrases, cut from the licence."""
    from transformers import AutoTokenizer

    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text("utf-8")
    tokens = AutoTokenizer.from_pretrained(model).encode(" ".join(text.split()))
    return [tokens[37 * index : 37 * index + PHRASE_TOKENS] for index in range(count)]


def repeated(phrase: list[int], size: int) -> list[int]:
    """A prompt of ``size`` tokens."""
    return (phrase * size)[:size]
