# SPDX-License-Identifier: Apache-2.0
"""Half of a worker's threads, for steps that run beside a node on the same CPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.config import CompilationMode, VllmConfig

from vllm_attn_offload.attention.micro_batch.sized_kernels import SizedKernels
from vllm_attn_offload.config import AttentionOffloadConfig


class HalfTeam:
    """Threads that compute on the first half of the worker's CPUs.

    Its node has the same CPUs and is told to attend on the others meanwhile. libgomp
    puts a smaller team's threads on the first CPUs of its list (GOMP_CPU_AFFINITY).

    Args:
        model: vLLM's model, loaded.
        num_cpus: CPUs that the worker and its node share.

    Attributes:
        num_threads: OpenMP threads of each thread that computes in the context.
    """

    def __init__(self, model: torch.nn.Module, num_cpus: int) -> None:
        self.num_threads = max(1, min(torch.get_num_threads(), num_cpus // 2))
        self._kernels = SizedKernels(model)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Context in which the model's products are the team's."""
        self._kernels.are_apart = True
        try:
            yield
        finally:
            self._kernels.are_apart = False

    def uninstall(self) -> None:
        """Leave the model as it was."""
        self._kernels.uninstall()


def why_undivided(vllm_config: VllmConfig) -> str | None:
    """Say why a worker and its nodes cannot divide the CPUs that they share.

    None where they can.
    """
    if torch.get_num_threads() < 2:
        return "the worker and its memory nodes share one CPU"
    if AttentionOffloadConfig.of_engine(vllm_config).num_local_nodes > 1:
        return "several memory nodes share the worker's CPUs"
    if "GOMP_CPU_AFFINITY" not in os.environ:
        return "its OpenMP runtime does not say which thread is on which CPU"
    # What keeps kernels of both numbers of threads apart is not seen by a compiler,
    # and those of quantized weights are kept by other names.
    if vllm_config.compilation_config.mode != CompilationMode.NONE:
        return (
            "the worker and its memory nodes take turns on the same CPUs, which only "
            "--enforce-eager lets them divide"
        )
    if vllm_config.model_config.quantization is not None:
        return (
            "the worker and its memory nodes take turns on the same CPUs, which "
            "kernels of quantized weights do not leave"
        )
    return None
