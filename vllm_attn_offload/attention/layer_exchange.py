# SPDX-License-Identifier: Apache-2.0
"""The interface between a layer of the model and the memory nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata

#: k and v are None where the layer shares those of another.
Qkv = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class LayerExchange(ABC):
    """Attends layers: prefills here, everything else on the memory nodes."""

    @abstractmethod
    def attend(
        self,
        metadata: AttentionOffloadMetadata,
        layer: int,
        qkv: Qkv,
        output: torch.Tensor,
        attention: LayerAttention,
    ) -> None:
        """Attend one layer of a step.

        Args:
            metadata: The step, or one micro-batch of it.
            layer: Index of the layer in the session's geometry.
            qkv: ``[num_tokens, num_heads, head_size]``, ``[num_tokens, num_kv_heads,
                head_size]`` and ``[num_tokens, num_kv_heads, v_head_size]``.
            output: ``[num_tokens, num_heads, v_head_size]``, filled.
            attention: Attributes of the layer.

        Raises:
            MemoryNodeError: A node is gone, too slow, or refused the layer.
        """

    @abstractmethod
    def close(self) -> None:
        """End what the exchange started; the nodes were closed before."""
