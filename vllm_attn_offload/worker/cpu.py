# SPDX-License-Identifier: Apache-2.0
"""The offloading worker on CPU compute nodes."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_attn_offload.attention.cpu_exchange import CpuExchange
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.plugin import BACKEND_PATH
from vllm_attn_offload.worker.base import (
    UNUSED_KV_CACHE_BYTES,
    AttentionOffloadWorker,
)


class CpuAttentionOffloadWorker(AttentionOffloadWorker, CPUWorker):
    """vLLM's CPU worker with its attention on memory nodes."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        # The base class refuses to start where memory is short for a local KV cache.
        # With an explicit size it does not look; the size itself is never used.
        vllm_config.cache_config.kv_cache_memory_bytes = UNUSED_KV_CACHE_BYTES
        super().__init__(vllm_config, *args, **kwargs)

    def determine_available_memory(self) -> int:
        """Warm the model up; the pool's size comes from the memory nodes."""
        if self._should_warm_up_model():
            self.model_runner.warming_up_model()
        return 0

    def _make_exchange(self, nodes: RemoteAttention) -> CpuExchange:
        return CpuExchange(nodes)

    def _register_backend(self) -> None:
        # The CPU platform ignores every other backend, but honours an override of its
        # own (vllm/platforms/cpu.py, get_attn_backend_cls).
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND_PATH)
