# SPDX-License-Identifier: Apache-2.0
"""Chooses who attends prefill chunks on the compute node: compiled kernels or torch."""

from __future__ import annotations

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

    def __init__(self) -> None:
        self._is_chosen = False
        self._native: NativePrefill | None = None

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
        if not self._is_chosen:
            self._native, self._is_chosen = _native_prefill(), True
        rows = (query, key, value, output, prefills, attention)
        if self._native is not None and _has_kernels(query, value, output):
            return self._native.attend(*rows)
        return attend_locally(*rows)


def _native_prefill() -> NativePrefill | None:
    """The compiled kernels, where they beat torch's."""
    library = load_cpu_library()
    # Of 16 to 2,000 rows torch takes 1.2 to 4 times as long with AVX2 and AVX-512. It
    # has kernels for AMX, and this package has none for other CPUs.
    if (
        library is None
        or torch.cpu._is_amx_tile_supported()
        or not library.isa_names[0].startswith("avx")
    ):
        return None
    own = os.sched_getaffinity(0)
    cpu_ids = sorted(process_cpu_ids(), key=lambda cpu: (cpu not in own, cpu))
    try:
        return NativePrefill(library, cpu_ids[: torch.get_num_threads()])
    except OSError as error:
        logger.warning("prefills are attended by torch: %s", error)
        return None


def _has_kernels(
    query: torch.Tensor, value: torch.Tensor, output: torch.Tensor
) -> bool:
    """Return True for what the compiled kernels take (``csrc/cache.cpp``)."""
    sizes = query.shape[2], value.shape[2]
    return output.is_contiguous() and all(s % 8 == 0 and s <= 576 for s in sizes)
