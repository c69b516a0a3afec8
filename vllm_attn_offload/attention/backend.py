# SPDX-License-Identifier: Apache-2.0
"""The attention backend that vLLM selects: what it supports, which classes it uses."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from vllm_attn_offload.attention.impl import AttentionOffloadImpl
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadataBuilder


class AttentionOffloadBackend(AttentionBackend):
    """Causal decoder attention over blocks that memory nodes hold.

    Capabilities not declared here (sliding window, sinks, MLA, non-causal, context
    parallelism, quantised KV) keep vLLM's default, which is "not supported".
    """

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]

    @staticmethod
    def get_name() -> str:
        """vLLM looks the name up in its enum of backends."""
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Any block size: blocks exist on memory nodes only."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layout of the one-block stub; the CPU platform insists on this one."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """A connector would read the stub."""
        return False

    @staticmethod
    def get_impl_cls() -> type[AttentionOffloadImpl]:
        """Class of a layer's attention."""
        return AttentionOffloadImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionOffloadMetadataBuilder]:
        """Class that builds a step's metadata."""
        return AttentionOffloadMetadataBuilder
