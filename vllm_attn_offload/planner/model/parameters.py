# SPDX-License-Identifier: Apache-2.0
"""Parameter counts from configuration values; biases and norms (< 0.1 %) left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Families whose feed-forward has two matrices instead of a gate and two; their
# configurations do not say so.
UNGATED_MLP = frozenset(
    ("opt", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "bloom")
    + ("falcon", "mpt", "phi", "starcoder2")
)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters by use. A table tied to `lm_head` counts there; `embedding` is 0."""

    linear: int
    experts: int
    lm_head: int
    embedding: int
    num_experts: int
    experts_per_token: int


def count_parameters(config: Mapping[str, Any]) -> ParameterCount:
    """Count from hidden sizes, heads and expert numbers."""
    hidden = config["hidden_size"]
    num_layers = config["num_hidden_layers"]
    matrices = 2 if config.get("model_type") in UNGATED_MLP else 3
    num_experts = _first(config, "n_routed_experts", "num_local_experts", "num_experts")
    is_moe = [bool(num_experts) and moe for moe in _moe_layers(config, num_layers)]
    moe_layers = sum(is_moe)
    inner = _inner_sizes(config, num_layers)
    moe_inner = config.get("moe_intermediate_size") or inner[0]
    shared = config.get("shared_expert_intermediate_size") or (
        (config.get("n_shared_experts") or 0) * moe_inner
    )
    linear = num_layers * _attention(config)
    dense = sum(size for size, moe in zip(inner, is_moe, strict=True) if not moe)
    linear += matrices * hidden * dense
    linear += moe_layers * (matrices * hidden * shared + hidden * num_experts)
    table = config["vocab_size"] * hidden
    # A tied table is read as the output projection in every step, so it counts there.
    return ParameterCount(
        linear=linear,
        experts=moe_layers * num_experts * matrices * hidden * moe_inner,
        lm_head=table,
        embedding=0 if config.get("tie_word_embeddings") else table,
        num_experts=num_experts if moe_layers else 0,
        experts_per_token=(config.get("num_experts_per_tok") or 0) if moe_layers else 0,
    )


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((config[name] for name in names if config.get(name)), 0)


def _inner_sizes(config: Mapping[str, Any], num_layers: int) -> list[int]:
    """Width of each layer's feed-forward; Gemma-3n gives one per layer."""
    sizes = config.get("intermediate_size") or config.get("ffn_dim")
    sizes = sizes or 4 * config["hidden_size"]
    return sizes if isinstance(sizes, list) else [sizes] * num_layers


def _moe_layers(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    """True for layers with routed experts.

    transformers spells them out, or: DeepSeek after the first k, Qwen every n-th.
    """
    kinds = config.get("mlp_layer_types")
    if kinds:
        return [kind == "sparse" for kind in kinds]
    dense_first = config.get("first_k_dense_replace") or 0
    step = config.get("decoder_sparse_step") or 1
    dense_only = set(config.get("mlp_only_layers") or ())
    return [
        i >= dense_first and (i + 1) % step == 0 and i not in dense_only
        for i in range(num_layers)
    ]


def _attention(config: Mapping[str, Any]) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("kv_lora_rank"):
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        nope, v_size = config["qk_nope_head_dim"], config["v_head_dim"]
        q_rank = config.get("q_lora_rank")
        q_out = heads * (nope + rope)
        q = hidden * q_rank + q_rank * q_out if q_rank else hidden * q_out
        kv = hidden * (rank + rope) + rank * heads * (nope + v_size)
        return int(q + kv + heads * v_size * hidden)
    size = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * hidden * heads * size + 2 * hidden * kv_heads * size)
