# SPDX-License-Identifier: Apache-2.0
"""Lets a worker's model run in micro-batches, where its options ask for it."""

from __future__ import annotations

import os

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_attn_offload.attention.micro_batch.choice import (
    MicroBatchChoice,
    NumMicroBatches,
)
from vllm_attn_offload.attention.micro_batch.half_team import HalfTeam, why_undivided
from vllm_attn_offload.attention.micro_batch.runner import MicroBatchRunner
from vllm_attn_offload.config import COMMON_CPUS_VARIABLE, AttentionOffloadConfig
from vllm_attn_offload.logger import get_logger

logger = get_logger(__name__)


def wrap_model(model: torch.nn.Module, vllm_config: VllmConfig) -> MicroBatchRunner:
    """Let a worker's decode steps run in micro-batches, where its options ask for it.

    Raises:
        ValueError: Two micro-batches were asked for, and they cannot be had.
    """
    option = AttentionOffloadConfig.of_engine(vllm_config).num_microbatches
    refusal = _refusal(vllm_config, option)
    if refusal is not None and option == 2:
        raise ValueError(
            f"num_microbatches=2 was given, but {refusal}. Allowed: 1 or auto. Drop "
            "num_microbatches."
        )
    if refusal is not None and option == "auto":
        logger.info("Decode steps are not cut into micro-batches: %s.", refusal)
        option = 1
    cudagraph_mode = vllm_config.compilation_config.cudagraph_mode
    if option == 2 and cudagraph_mode.has_piecewise_cudagraphs():
        logger.info("Decode steps in two micro-batches run without CUDA graphs.")
    choice = MicroBatchChoice(option, _agree_with_first)
    half_team = None
    if option == "auto" and (num_cpus := os.environ.get(COMMON_CPUS_VARIABLE)):
        half_team = HalfTeam(model, int(num_cpus))
    return MicroBatchRunner(model, choice, half_team)


def _refusal(vllm_config: VllmConfig, option: NumMicroBatches) -> str | None:
    is_cpu = vllm_config.device_config.device_type == "cpu"
    if vllm_config.model_config.is_hybrid:
        return "layers with recurrent states compute whole steps"
    if vllm_config.lora_config is not None and not is_cpu:
        return "LoRA on a GPU assigns adapters to the rows of whole steps"
    if option == "auto" and not is_cpu:
        return "the host cannot time a GPU's steps"
    if option == "auto" and COMMON_CPUS_VARIABLE in os.environ:
        return why_undivided(vllm_config)
    return None


def _agree_with_first(values: list[float]) -> list[float]:
    """The values of the first tensor-parallel rank."""
    group = get_tp_group()
    if group.world_size > 1:
        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.broadcast(tensor, group.first_rank, group=group.cpu_group)
        values = tensor.tolist()
    return values
