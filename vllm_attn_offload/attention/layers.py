# SPDX-License-Identifier: Apache-2.0
"""The attention layers of a loaded model, and those that cannot be offloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase

from vllm_attn_offload.attention.impl import AttentionOffloadImpl

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def attention_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """Layers by name, in the order of their index in the session's geometry."""
    context = vllm_config.compilation_config.static_forward_context
    return {
        name: layer for name, layer in context.items() if isinstance(layer, Attention)
    }


def mark_drafter_layers(vllm_config: VllmConfig, target: torch.nn.Module) -> None:
    """Tell apart the layers that are not the target's: a drafter's.

    vLLM's two model runners keep their names in different places, and neither prefix
    nor number of a layer says it for every kind of drafter.

    Args:
        vllm_config: With all layers that were loaded.
        target: The target model.
    """
    own = {id(module) for module in target.modules()}
    for layer in attention_layers(vllm_config).values():
        cast(AttentionOffloadImpl, layer.impl).is_drafter = id(layer) not in own


def layer_problems(vllm_config: VllmConfig) -> list[str]:
    """Name the layers that memory nodes cannot attend for, and why."""
    return [*_foreign_layers(vllm_config), *_uneven_values(vllm_config)]


def _foreign_layers(vllm_config: VllmConfig) -> list[str]:
    """Layers with attention of another class."""
    context = vllm_config.compilation_config.static_forward_context
    return [
        f"{name} ({type(layer).__name__})"
        for name, layer in context.items()
        if isinstance(layer, AttentionLayerBase)
        and not isinstance(layer, MambaBase)  # its states stay here
        and not (
            isinstance(layer, Attention)
            and isinstance(layer.impl, AttentionOffloadImpl)
        )
    ]


def _uneven_values(vllm_config: VllmConfig) -> list[str]:
    return [
        f"{name} (values of size {layer.head_size_v}, keys of {layer.head_size})"
        for name, layer in attention_layers(vllm_config).items()
        if layer.head_size_v != layer.head_size
    ]
