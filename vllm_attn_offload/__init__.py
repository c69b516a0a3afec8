# SPDX-License-Identifier: Apache-2.0
"""Attention offloading for vLLM: decode attention runs on memory nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "AttentionOffloadConfig", "__version__"]

if TYPE_CHECKING:
    from vllm_attn_offload.config import AttentionOffloadConfig
    from vllm_attn_offload.llm import LLM


def __getattr__(name: str) -> object:
    # Lazy, because a memory node imports this package and must never import vLLM.
    if name == "LLM":
        from vllm_attn_offload.llm import LLM

        return LLM
    if name == "AttentionOffloadConfig":
        from vllm_attn_offload.config import AttentionOffloadConfig

        return AttentionOffloadConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
