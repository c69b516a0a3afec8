# SPDX-License-Identifier: Apache-2.0
"""Parameter counts from configuration values; biases and norms (< 0.1 %) left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_attn_offload.planner.model.shape import LayerShape

# Families whose feed-forward has two matrices instead of a gate and two; their
# configurations do not say so.
UNGATED_MLP = frozenset(
    ("opt", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "bloom")
    + ("falcon", "mpt", "phi", "starcoder2", "apertus", "arcee", "jais2", "nemotron")
)
# Families with weights that no rule here counts: tables per layer, stacks that are
# used more than once, experts of several sizes or in some layers.
IRREGULAR = frozenset(
    ("gemma3n_text", "gemma4_text", "gemma4_unified_text", "diffusion_gemma_text")
    + ("hrm_text", "llama4_text", "longcat_flash", "ernie4_5_vl_moe_text", "lfm2")
)
REGULAR_LAYERS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters by use. A table tied to `lm_head` counts there; `embedding` is 0."""

    linear: int
    experts: int
    lm_head: int
    embedding: int
    num_experts: int
    experts_per_token: int


def follows_rules(config: Mapping[str, Any]) -> bool:
    """False for models that only their own class can count."""
    kinds = set(config.get("layer_types") or ())
    return kinds <= REGULAR_LAYERS and config.get("model_type") not in IRREGULAR


def count_parameters(
    config: Mapping[str, Any], layers: Sequence[LayerShape]
) -> ParameterCount:
    """Counted parameters of the config, or a count by rule from its sizes."""
    num_experts = _first(config, "n_routed_experts", "num_local_experts", "num_experts")
    per_token = config.get("num_experts_per_tok") or 0
    if counted := config.get("parameters"):
        is_sparse = bool(counted["experts"])
        return ParameterCount(
            **counted,
            num_experts=num_experts * is_sparse,
            experts_per_token=per_token * is_sparse,
        )
    hidden = config["hidden_size"]
    num_layers = config["num_hidden_layers"]
    matrices = 2 if config.get("model_type") in UNGATED_MLP else 3
    is_moe = [bool(num_experts) and moe for moe in _moe_layers(config, num_layers)]
    moe_layers = sum(is_moe)
    inner = _inner_sizes(config, num_layers)
    moe_inner = config.get("moe_intermediate_size") or inner[0]
    shared = config.get("shared_expert_intermediate_size") or (
        (config.get("n_shared_experts") or 0) * moe_inner
    )
    linear = sum(g.num_layers * _attention(config, g) for g in layers)
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
        experts_per_token=per_token if moe_layers else 0,
    )


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((config[name] for name in names if config.get(name)), 0)


def _inner_sizes(config: Mapping[str, Any], num_layers: int) -> list[int]:
    """Width of each layer's feed-forward; some give one per layer."""
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


def _attention(config: Mapping[str, Any], layer: LayerShape) -> int:
    hidden, heads = config["hidden_size"], layer.num_heads
    if config.get("kv_lora_rank"):
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        nope, v_size = config["qk_nope_head_dim"], config["v_head_dim"]
        q_rank = config.get("q_lora_rank")
        q_out = heads * (nope + rope)
        q = hidden * q_rank + q_rank * q_out if q_rank else hidden * q_out
        kv = hidden * (rank + rope) + rank * heads * (nope + v_size)
        return int(q + kv + heads * v_size * hidden)
    return int(hidden * (layer.q_elements + layer.kv_elements + layer.out_elements))
