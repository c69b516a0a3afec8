# SPDX-License-Identifier: Apache-2.0
"""A small config.json of every architecture that transformers and vLLM both know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm.model_executor.models.registry import ModelRegistry

TASKS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)
# Attention keeps the sizes of each class's defaults. These are for a quick start only,
# and set where the family has them.
SMALL: dict[str, Any] = {
    "num_hidden_layers": 12,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Zamba2's list of layers is as long by default; of the others, vLLM traces every layer
# for half a second.
DEPTH = {"zamba2": 54, "flex_olmo": 4, "mellum": 4}
# What checkpoints have, vLLM reads and transformers' defaults leave out, by the type of
# the text model.
CHECKPOINT: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0}
    | {"n_group": 1, "topk_group": 1, "num_expert_groups": 1, "num_limited_groups": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 5e5, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "glm4_moe": {"head_dim": 128},
    "glm4v_moe_text": {"head_dim": 128},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "moe_layer_freq": 1},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 32}
    | {"route_norm": True, "num_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "kimi_linear": {
        "linear_attn_config": {
            **{"num_heads": 16, "head_dim": 64, "short_conv_kernel_size": 4},
            "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11],
            "full_attn_layers": [4, 8, 12],
        },
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 3,
    },
    "lfm2": {"block_dim": 2560, "block_ff_dim": 64, "block_multiple_of": 256}
    | {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0}
    | {"conv_dim": 2560, "conv_dim_out": 2560, "full_attn_idxs": [2, 5, 8, 10]}
    | {"layer_types": None},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 4}
    | {"conv_dim": 2048, "conv_dim_out": 2048},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True}
    | {"zero_expert_type": "identity", "router_bias": False}
    | {"intermediate_size": 64, "moe_intermediate_size": 32},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]}
    | {"layernorm_epsilon": 1e-5, "scoring_func": "sigmoid", "attention_bias": False}
    | {"swa_num_attention_heads": 64, "swa_num_key_value_heads": 8}
    | {"swa_head_dim": 192, "swa_v_head_dim": 128, "sliding_window_size": 128}
    | {"moe_layer_freq": [0] + [1] * 11},
    "minimax_m2": {"rotary_dim": 64, "scoring_func": "sigmoid"},
    "nemotron": {"num_key_value_heads": 8},
}


def architectures() -> dict[str, str]:
    """Model type by architecture."""
    known = set(ModelRegistry.get_supported_archs())
    found = {}
    for task in TASKS:
        for model_type, names in task.items():
            for name in [names] if isinstance(names, str) else names:
                if name in known:
                    found.setdefault(name, model_type)
    return found


def write_configs(folder: Path) -> list[Path]:
    """Folders in ``folder`` with a config.json, named after their architectures.

    All at once: reading one through vLLM may change transformers' class of another.
    """
    paths = []
    for architecture, model_type in sorted(architectures().items()):
        path = folder / architecture
        path.mkdir()
        is_text_only = architecture.endswith("CausalLM")
        config = small_config(model_type, is_text_only=is_text_only)
        config |= {"architectures": [architecture]}
        (path / "config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def small_config(model_type: str, *, is_text_only: bool) -> dict[str, Any]:
    """Values of the type's config, with few layers and a small text model."""
    config = CONFIG_MAPPING[model_type]()
    text = config.get_text_config()
    sizes = {
        key: value
        for key, value in SMALL.items()
        if isinstance(getattr(text, key, None), int)
    }
    if "num_hidden_layers" in sizes and text.model_type in DEPTH:
        sizes["num_hidden_layers"] = DEPTH[text.model_type]
    small = type(text)(**sizes).to_dict() | CHECKPOINT.get(text.model_type, {})
    return small if is_text_only else _replace(config.to_dict(), text, small)


def _replace(
    values: dict[str, Any], text: PretrainedConfig, small: dict[str, Any]
) -> dict[str, Any]:
    if values.get("model_type") == text.model_type:
        return small
    return {
        key: _replace(value, text, small) if isinstance(value, dict) else value
        for key, value in values.items()
    }
