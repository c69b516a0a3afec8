# SPDX-License-Identifier: Apache-2.0
"""Chooses who attends prefill chunks on the compute node: compiled kernels or torch."""

from __future__ import annotations

import functools
import os

import torch

from vllm_attn_offload.attention.cpu_prefill import attend_locally
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.native_prefill import NativePrefill
from vllm_attn_offload.client.step_partition import Prefill
from vllm_attn_offload.logger import get_logger
from vllm_attn_offload.native.attention import load_cpu_library
from vllm_attn_offload.transport.spin_policy import process_cpu_ids

logger = get_logger(__name__)


class LocalPrefill:
    """Attends chunks by whatever is fastest here.

    Threads start with the first chunk: those of OpenMP have their CPUs by then.
    """

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        prefills: tuple[Prefill, ...],
        attention: LayerAttention,
    ) -> torch.Tensor:
        """Causal attention of every prefill over its own rows: see `attend_locally`."""
        rows = (query, key, value, output, prefills, attention)
        if self._native is not None and _has_kernels(query, value, output):
            return self._native.attend(*rows)
        return attend_locally(*rows)

    @functools.cached_property
    def _native(self) -> NativePrefill | None:
        return _native_prefill()


def _native_prefill() -> NativePrefill | None:
    """The compiled kernels, where they beat torch's."""
    library = load_cpu_library()
    # On an AMD EPYC torch took 1.2 to 4 times as long for 16 to 2,000 rows. It has
    # kernels for AMX, and this package has none that are tuned for other CPUs.
    if (
        library is None
        or torch.cpu._is_amx_tile_supported()
        or not library.isa_names[0].startswith("avx")
        or _openmp_threads_keep_cpus()
    ):
        return None
    num_threads, own = torch.get_num_threads(), os.sched_getaffinity(0)
    cpu_ids = sorted(process_cpu_ids(), key=lambda cpu: (cpu not in own, cpu))
    # Where OpenMP's threads may run anywhere, so may these.
    is_pinned = len(own) == 1 and len(cpu_ids) >= num_threads
    try:
        return NativePrefill(
            library, num_threads, cpu_ids[:num_threads] if is_pinned else None
        )
    except OSError as error:
        logger.warning("prefills are attended by torch: %s", error)
        return None


def _openmp_threads_keep_cpus() -> bool:
    """Return True where idle ones spin for long on what the kernels' threads need.

    vLLM gives those of Intel's and LLVM's runtime 5 ms.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    return os.environ.get("OMP_WAIT_POLICY", "").lower() == "active" or any(
        name in preloaded for name in ("libiomp", "libomp")
    )


def _has_kernels(
    query: torch.Tensor, value: torch.Tensor, output: torch.Tensor
) -> bool:
    """Return True for what the compiled kernels take (``csrc/cache.cpp``)."""
    sizes = query.shape[2], value.shape[2]
    return (
        output.is_contiguous()
        and output.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(size % 8 == 0 and size <= 576 for size in sizes)
    )
