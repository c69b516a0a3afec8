# SPDX-License-Identifier: Apache-2.0
"""The offloading worker on CUDA compute nodes."""

from __future__ import annotations

from typing import Any, cast

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from vllm_attn_offload.attention.cuda.exchange import CudaExchange
from vllm_attn_offload.attention.cuda.prefill import FlashPrefill
from vllm_attn_offload.attention.cuda.streams import CudaStreams
from vllm_attn_offload.attention.impl import AttentionOffloadImpl
from vllm_attn_offload.attention.layers import attention_layers
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.plugin import BACKEND_PATH
from vllm_attn_offload.transport.cuda_memory import CudaDevice, SharedDevice
from vllm_attn_offload.worker.base import (
    UNUSED_KV_CACHE_BYTES,
    AttentionOffloadWorker,
)

logger = get_logger(__name__)


class GpuAttentionOffloadWorker(AttentionOffloadWorker, Worker):
    """vLLM's GPU worker, for both of its model runners, with attention on nodes."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        # With an explicit size the base class does not ask whether weights leave room
        # for a local KV cache, and captures no graphs to find out; the size itself is
        # never used.
        vllm_config.cache_config.kv_cache_memory_bytes = UNUSED_KV_CACHE_BYTES
        # This process's copy: vLLM's worker compares with the name, not with our class.
        if vllm_config.parallel_config.use_ray:
            vllm_config.parallel_config.distributed_executor_backend = "ray"
        super().__init__(vllm_config, *args, **kwargs)

    def determine_available_memory(self) -> int:
        """Warm the model up; the pool's size comes from the memory nodes."""
        logger.info(
            "Attention offload: memory nodes hold the KV cache; the GPU reserves none "
            "of the %s GiB that vLLM logs for it.",
            UNUSED_KV_CACHE_BYTES >> 30,
        )
        super().determine_available_memory()
        return 0

    def free_device_bytes(self) -> int:
        """Memory of the GPU that gpu_memory_utilization leaves for states."""
        torch.cuda.empty_cache()  # what weights passed through
        free, total = torch.cuda.mem_get_info(self.device)
        kept = total * (1 - self.cache_config.gpu_memory_utilization)
        return max(0, int(free - kept))

    def _shared_device(self) -> SharedDevice:
        device = self.device
        assert device is not None
        return CudaDevice(device)

    def _make_exchange(self, nodes: RemoteAttention) -> CudaExchange:
        device = self.device
        assert device is not None
        prefill = FlashPrefill()
        for layer in attention_layers(self.vllm_config).values():
            impl = cast(AttentionOffloadImpl, layer.impl)
            prefill.version(impl.head_size, impl.attention)
        return CudaExchange(nodes, lambda: CudaStreams(device), prefill)

    def _register_backend(self) -> None:
        # Also where VLLM_PLUGINS leaves the plugin out.
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
