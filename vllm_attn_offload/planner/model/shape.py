# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model: weights, KV cache, and bytes on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Layers with equal attention geometry.

    All element counts are per token and layer. `window` is the number of cached tokens
    a query sees (None: all). `flops_per_kv_token` is the work of one query token on one
    cached token, QK^T and PV together. Layers with `shares_kv` read an earlier layer's
    keys and values, and keep none.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    q_elements: int
    kv_elements: int
    out_elements: int
    flops_per_kv_token: int
    window: int | None = None
    shares_kv: bool = False

    def visible(self, context: float) -> float:
        """Cached tokens that a query at `context` reads."""
        return context if self.window is None else min(context, self.window)


def gqa_layers(
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    v_head_size: int | None = None,
    window: int | None = None,
) -> LayerShape:
    """Layers with multi-head or grouped-query attention."""
    v_size = head_size if v_head_size is None else v_head_size
    return LayerShape(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_elements=num_heads * head_size,
        kv_elements=num_kv_heads * (head_size + v_size),
        out_elements=num_heads * v_size,
        flops_per_kv_token=2 * num_heads * (head_size + v_size),
        window=window,
    )


def mla_layers(
    num_layers: int, num_heads: int, kv_lora_rank: int, rope_head_dim: int
) -> LayerShape:
    """Layers with multi-head latent attention in its absorbed decode form.

    The cache holds one latent row for all heads, so there is one KV head, while q and
    the output stay `num_heads` latent rows wide (DeepSeek-V2, arXiv 2405.04434).
    """
    latent = kv_lora_rank + rope_head_dim
    return LayerShape(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=1,
        q_elements=num_heads * latent,
        kv_elements=latent,
        out_elements=num_heads * kv_lora_rank,
        flops_per_kv_token=2 * num_heads * (latent + kv_lora_rank),
    )


@dataclass(frozen=True, slots=True)
class StateShape:
    """Layers with a recurrent state per request, as large for any number of tokens.

    `num_attending` of them attend as well; `layer_bytes` is of one state and layer. A
    request holds `num_held` with prefix caching, vLLM's default: the newest, the one at
    the last block's end, which it is copied from, and of Mamba-2 one within a prompt.
    """

    num_layers: int
    num_attending: int
    layer_bytes: float
    num_held: int = 2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of one model. Bytes are of the whole model, not of a tensor-parallel rank.

    `dense_*` are weights that every decode step reads, `lm_head_*` those of them
    outside the layers, `expert_*` the routed experts, `embedding_bytes` input
    embeddings that a step only looks up. Without recurrent layers `states` is None.
    """

    name: str
    hidden_size: int
    layers: tuple[LayerShape, ...]
    dense_params: float
    dense_bytes: float
    lm_head_params: float = 0.0
    lm_head_bytes: float = 0.0
    expert_params: float = 0.0
    expert_bytes: float = 0.0
    num_experts: int = 0
    experts_per_token: int = 0
    embedding_params: float = 0.0
    embedding_bytes: float = 0.0
    activation_bytes: float = 2.0
    kv_element_bytes: float = 2.0
    states: StateShape | None = None

    @property
    def num_layers(self) -> int:
        """Attention layers of all shapes."""
        return sum(layer.num_layers for layer in self.layers)

    @property
    def num_mixing_layers(self) -> int:
        """Layers that attend, keep a recurrent state, or do both."""
        states = self.states
        recurrent = states.num_layers - states.num_attending if states else 0
        return self.num_layers + recurrent

    @property
    def state_bytes(self) -> float:
        """Bytes of one recurrent state of one request, all layers."""
        states = self.states
        return states.num_layers * states.layer_bytes if states else 0.0

    @property
    def held_state_bytes(self) -> float:
        """Bytes of all recurrent states that a request holds at a time."""
        return self.states.num_held * self.state_bytes if self.states else 0.0

    @property
    def num_params(self) -> float:
        """All parameters."""
        return self.dense_params + self.expert_params + self.embedding_params

    @property
    def weight_bytes(self) -> float:
        """Bytes that the weights occupy."""
        return self.dense_bytes + self.expert_bytes + self.embedding_bytes

    @property
    def flops_per_token(self) -> float:
        """Non-attention flops of one token: two per parameter used."""
        share = self.experts_per_token / self.num_experts if self.num_experts else 0.0
        return 2 * (self.dense_params + self.expert_params * share)

    def streamed_bytes(self, rows: float) -> float:
        """Weight bytes one step with `rows` tokens reads.

        Experts: E (1 - (1 - k/E)^rows) of E are touched if routing is uniform.
        """
        if not self.num_experts:
            return self.dense_bytes
        miss = (1 - self.experts_per_token / self.num_experts) ** rows
        return self.dense_bytes + self.expert_bytes * (1 - miss)

    def kv_bytes(self, context: float) -> float:
        """KV bytes of one request with `context` cached tokens, windows respected."""
        return self._kv_bytes(context, [g for g in self.layers if not g.shares_kv])

    def kv_read_bytes(self, context: float) -> float:
        """KV bytes that one query token over `context` cached tokens reads."""
        return self._kv_bytes(context, self.layers)

    def _kv_bytes(self, context: float, layers: Iterable[LayerShape]) -> float:
        elements = sum(
            g.num_layers * g.kv_elements * g.visible(context) for g in layers
        )
        return elements * self.kv_element_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """KV bytes that one more token adds while no window is full."""
        return self.kv_bytes(1)

    def attention_flops(self, context: float) -> float:
        """Flops of one query token over `context` cached tokens, all layers."""
        return sum(
            g.num_layers * g.flops_per_kv_token * g.visible(context)
            for g in self.layers
        )

    def wire_bytes(self, num_nodes: int = 1, partition: str = "heads") -> float:
        """Bytes one token exchanges with all memory nodes, both directions.

        Head partition: q, k, v and out once each, split over the nodes; for one node
        this is Lamina's (2 + 2/G) e d L (arXiv 2405.01814 section 3). Block partition:
        every node gets q and answers with out and an fp32 log-sum-exp per head.
        """
        total = 0.0
        for g in self.layers:
            q = g.q_elements * self.activation_bytes
            kv = 0.0 if g.shares_kv else g.kv_elements * self.activation_bytes
            out = g.out_elements * self.activation_bytes
            if partition == "blocks" and num_nodes > 1:
                lse = 4 * g.num_heads
                total += g.num_layers * (num_nodes * (q + out + lse) + kv)
            else:
                total += g.num_layers * (q + kv + out)
        return total
