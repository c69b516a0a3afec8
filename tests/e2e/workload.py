# SPDX-License-Identifier: Apache-2.0
"""The prompts of the end-to-end tests, in the order in which they are sent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

NUM_TOKENS = 32
MAX_MODEL_LEN = 3584
#: Around block boundaries (128), long enough to be chunked (512), and very short.
_LENGTHS = (
    *(1, 2, 15, 33, 64, 100, 110, 127, 128, 129),
    *(130, 140, 150, 160, 200, 240, 255, 256, 257, 3000),
)
#: CPUs without bf16 instructions multiply bf16 at a tenth of their fp32 speed.
_SHORT_LENGTHS = (
    *(1, 2, 56, 60, 64, 65, 70, 72, 80, 88),
    *(96, 100, 104, 112, 120, 126, 127, 128, 129, 144),
)
#: A prompt repeats a phrase of its own, which the model then goes on with: its choices
#: are sure, and a wrong output shows rather than a tie that rounding decides.
PHRASE_TOKENS = 8
#: This many of the longest prompts come again with a new end: prefix-cache hits.
NUM_SHARED = 4
NUM_PROMPTS = len(_LENGTHS)

#: Both engines use these: chunked prefill, and every request competes for the pool.
ENGINE_OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": MAX_MODEL_LEN,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 24,
}
BLOCK_TOKENS = 128
#: Blocks for one longest request and little more. The 19 short prompts of fp32 take
#: 30 and grow to 37: some are preempted.
POOL_BLOCKS = 32


def lengths(dtype: str) -> tuple[int, ...]:
    """Prompt lengths of the first round, in tokens."""
    has_bf16 = (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    if dtype == "float32" or has_bf16 or os.environ.get("ATTN_OFFLOAD_TEST_FULL"):
        return _LENGTHS
    return _SHORT_LENGTHS


def prompts(model: str, dtype: str) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the first round, and of the second that shares prefixes with it."""
    from transformers import AutoTokenizer

    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text("utf-8")
    tokens = AutoTokenizer.from_pretrained(model).encode(" ".join(text.split()))
    phrases = [
        tokens[37 * index : 37 * index + PHRASE_TOKENS] for index in range(NUM_PROMPTS)
    ]
    sizes = lengths(dtype)
    first = [
        _repeated(phrase, size) for phrase, size in zip(phrases, sizes, strict=True)
    ]
    again = sorted(range(NUM_PROMPTS), key=sizes.__getitem__)[-NUM_SHARED:]
    second = [_repeated(phrases[index], sizes[index] + 7) for index in again]
    return first, second


def _repeated(phrase: list[int], size: int) -> list[int]:
    return (phrase * size)[:size]


def pool_gib(dtype: str, block_tokens: int = BLOCK_TOKENS) -> float:
    """GiB of ``POOL_BLOCKS`` blocks of SmolLM2-135M (30 layers, 3 KV heads of 64)."""
    item_bytes = 4 if dtype == "float32" else 2
    return POOL_BLOCKS * block_tokens * 30 * 2 * 3 * 64 * item_bytes / (1 << 30) + 1e-6


#: Of the server: a pool that stock vLLM refuses under this share of the host's memory.
SERVE_KV_GIB = 2.0
SERVE_MEMORY_UTILIZATION = 0.02
