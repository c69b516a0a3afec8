# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention layer, whose KV blocks live on memory nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.layer_exchange import LayerExchange
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata

_FUSED_QUANTISATION = (
    "Attention offloading does not support fused output quantisation. Allowed: "
    "unquantised attention output. Disable fuse_attn_quant."
)


class AttentionOffloadImpl(AttentionImpl[AttentionOffloadMetadata]):
    """Attention of a layer whose KV blocks live on memory nodes.

    Raises:
        ValueError: The layer needs a feature that this release refuses.
    """

    #: The target model does not run this layer.
    is_drafter = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.attention = LayerAttention(
            self.scale,
            sliding_window or 0,
            logits_soft_cap or 0.0,
            # Of their own dtype: vLLM makes layers with that of the model.
            None
            if alibi_slopes is None
            else torch.tensor(alibi_slopes, dtype=torch.float32),
            # The parameter itself, which is filled, and filled again, later.
            sinks,
        )
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._exchange: LayerExchange | None = None
        self._layer_index = -1
        refused = {
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            **{name: value is not None for name, value in extra.items()},
        }
        if wanted := [name for name, value in refused.items() if value]:
            raise ValueError(
                f"Attention offloading does not support {', '.join(wanted)}. Allowed: "
                "causal decoder attention. Run this model without --attention-offload."
            )

    def connect(
        self,
        exchange: LayerExchange | None,
        layer_index: int,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """Hand the layer its way to the memory nodes.

        Args:
            exchange: Shared by all layers of the worker; None while a worker only warms
                up: attention then returns zeros.
            layer_index: Index of the layer in the session's geometry.
            k_scale: As the geometry has it.
            v_scale: Likewise.
        """
        self._exchange, self._layer_index = exchange, layer_index
        self.attention = replace(self.attention, k_scale=k_scale, v_scale=v_scale)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionOffloadMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to cached tokens on the nodes and to those of prefills here.

        Args:
            layer: The vLLM layer.
            query: ``[num_tokens, num_heads, head_size]``.
            key: ``[num_tokens, num_kv_heads, head_size]``; None where the layer shares
                the KV of another.
            value: ``[num_tokens, num_kv_heads, v_head_size]``, as ``key``.
            kv_cache: The one-block stub; never touched.
            attn_metadata: The step, or None in most profiling and warm-up runs.
            output: ``[num_tokens, num_heads, v_head_size]``, filled and returned; rows
                that only pad the batch stay as they are.

        Raises:
            MemoryNodeError: A memory node is gone, too slow, or refused the layer.
            ValueError: Output quantisation was fused into attention.
        """
        exchange = self._exchange
        if attn_metadata is None or exchange is None:
            return output.fill_(0)
        if output_scale is not None or output_block_scale is not None:
            raise ValueError(_FUSED_QUANTISATION)
        out = output
        num_tokens = attn_metadata.num_tokens
        if query.shape[0] != num_tokens:
            out = output[:num_tokens]
            query = query[:num_tokens]
            key = None if key is None else key[:num_tokens]
            value = None if value is None else value[:num_tokens]
        if self.kv_sharing_target_layer_name is not None:
            # Some models pass what the layer would have stored.
            key = value = None
        qkv = (query, key, value)
        exchange.attend(attn_metadata, self._layer_index, qkv, out, self.attention)
        return output
