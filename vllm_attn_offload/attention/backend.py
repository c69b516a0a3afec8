# SPDX-License-Identifier: Apache-2.0
"""The attention backend that vLLM selects: what it supports, which classes it uses."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from vllm_attn_offload.attention.impl import AttentionOffloadImpl
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadataBuilder

_MIN_CAPABILITY = DeviceCapability(8, 0)


class AttentionOffloadBackend(AttentionBackend):
    """Causal decoder attention over blocks that memory nodes hold.

    Capabilities not declared here (MLA, non-causal, context parallelism) keep vLLM's
    default, which is "not supported".
    """

    forward_includes_kv_cache_update: bool = True
    # On GPUs prefills are attended by FlashAttention, which has no fp32.
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        *([torch.float32] if current_platform.is_cpu() else []),
    ]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
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
    def supports_head_size(cls, head_size: int) -> bool:
        """On GPUs what FlashAttention supports."""
        if current_platform.is_cpu():
            return super().supports_head_size(head_size)
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

        return FlashAttentionBackend.supports_head_size(head_size)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Every kernel of a memory node masks what a window hides."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Sinks enter on the compute node, after the last merge."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Same as FlashAttention."""
        return capability >= _MIN_CAPABILITY

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Steps are divided between nodes by the query lengths on the host."""
        return False

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
