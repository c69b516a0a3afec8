# SPDX-License-Identifier: Apache-2.0
"""The prompts of the end-to-end tests, in the order in which they are sent."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness.prompts import LENGTHS, phrases_of, repeated

NUM_TOKENS = 32
MAX_MODEL_LEN = 3584
#: The last one is long enough to be chunked (512).
_LENGTHS = (*LENGTHS, 3000)
#: CPUs without bf16 instructions multiply bf16 at a tenth of their fp32 speed.
_SHORT_LENGTHS = (
    *(1, 2, 56, 60, 64, 65, 70, 72, 80, 88),
    *(96, 100, 104, 112, 120, 126, 127, 128, 129, 144),
)
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

TOKEN_FILE = Path(tempfile.gettempdir()) / f"attn-offload-test-token-{os.getuid()}"


@dataclass(frozen=True)
class Mode:
    """An engine of the tests.

    Args:
        num_nodes: Memory nodes that the test starts for it; 0: it starts its own.
        offload: Options of attention offloading; None: stock vLLM.
        engine: Options that differ from ``ENGINE_OPTIONS``.
        variables: Added to the environment.
        is_remote: Whether its nodes are on another host, which asks for a token.
        sharing_rounds: How often prompts that share a prefix arrive together.
        longest: Prompts of more tokens are left out.
        uses_adapters: Whether requests with LoRA adapters come, too.
    """

    num_nodes: int = 0
    offload: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    is_remote: bool = False
    sharing_rounds: int = 0
    longest: int = MAX_MODEL_LEN
    uses_adapters: bool = False


MODES = {
    "stock": Mode(sharing_rounds=1, uses_adapters=True),
    # Without a binding of the tests: the engine and its node share CPUs.
    "offload": Mode(offload={}, variables={"VLLM_CPU_OMP_THREADS_BIND": "auto"}),
    "heads-3": Mode(
        3,
        {"partition": "heads"},
        # Long prompts are one chunk, attended on the compute node alone.
        {"max_num_batched_tokens": 2048, "enable_prefix_caching": False},
    ),
    "blocks-2": Mode(
        2,
        {"partition": "blocks", "auth_token_file": str(TOKEN_FILE)},
        # Most prompts are many chunks, attended on both sides.
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
        is_remote=True,
        longest=300,
    ),
    # One KV head per rank; ranks share the nodes.
    "blocks-2-tp-3": Mode(
        2,
        {"partition": "auto"},
        {"tensor_parallel_size": 3},
        # Not "auto", which wants a core for each.
        {"VLLM_CPU_OMP_THREADS_BIND": "0|0|1"},
        # Ranks that share cores wait for each other more than they compute.
        longest=130,
    ),
    "micro-batches": Mode(
        2,
        {"partition": "blocks", "num_microbatches": 2},
        # In one process, so that a request can join a chosen step.
        variables={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        sharing_rounds=20,
        longest=300,
        uses_adapters=True,
    ),
}
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


def phrases(model: str) -> list[list[int]]:
    """Token ids of the phrase that each prompt repeats."""
    return phrases_of(model, NUM_PROMPTS)


def prompts(model: str, dtype: str) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the first round, and of the second that shares prefixes with it."""
    texts, sizes = phrases(model), lengths(dtype)
    first = [repeated(phrase, size) for phrase, size in zip(texts, sizes, strict=True)]
    again = sorted(range(NUM_PROMPTS), key=sizes.__getitem__)[-NUM_SHARED:]
    second = [repeated(texts[index], sizes[index] + 7) for index in again]
    return first, second


def pool_gib(dtype: str, block_tokens: int = BLOCK_TOKENS) -> float:
    """GiB of ``POOL_BLOCKS`` blocks of SmolLM2-135M (30 layers, 3 KV heads of 64)."""
    item_bytes = 4 if dtype == "float32" else 2
    return POOL_BLOCKS * block_tokens * 30 * 2 * 3 * 64 * item_bytes / (1 << 30) + 1e-6


#: Of the server: a pool that stock vLLM refuses under this share of the host's memory.
SERVE_KV_GIB = 2.0
SERVE_MEMORY_UTILIZATION = 0.02
