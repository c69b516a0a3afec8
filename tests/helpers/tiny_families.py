# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of model families whose attention differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_decilm
import torch
from transformers import AutoConfig, AutoModelForCausalLM

#: Smaller than vLLM's blocks on CPUs, so that blocks fall out of it soon.
WINDOW = 40
MAX_MODEL_LEN = 512
BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_MODEL_LEN,
    # Large, so that tokens depend on what attention returns.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
MOE: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
TIED = {"tie_word_embeddings": True}
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 6,
    "sliding_window": WINDOW,
    "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 16,
    "initializer_range": 0.1,
    **TIED,
}
#: Of the Mamba-2 layers of hybrid models. Their heads are ``hidden_size`` / 4 long.
HYBRID: dict[str, Any] = {
    "hidden_size": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_ssm": 256,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
    "initializer_range": 0.1,
}
NEMOTRON_H: dict[str, Any] = {
    "layers_block_type": ["mamba", "attention", "mlp", "mamba", "attention"],
    "num_hidden_layers": 5,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 1,
    "conv_kernel": 4,
    "chunk_size": 32,
    "expand": 2,
}
LFM2: dict[str, Any] = {
    "layer_types": ["conv", "conv", "full_attention"] * 2,
    "num_hidden_layers": 6,
    "conv_L_cache": 3,
    "conv_dim": 128,
    "conv_dim_out": 128,
    "block_dim": 128,
    "block_ff_dim": 128,
    "block_auto_adjust_ff_dim": False,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
}
QWEN3_NEXT: dict[str, Any] = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    # vLLM's CPU kernel takes heads of 64 and more. Few of them, because the blocks of
    # layers that attend are as large as the states.
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}

#: Type of transformers' config, and what differs from ``BASE``.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "phi3": ("phi3", {"sliding_window": 4096}),
    "gpt_oss": (
        "gpt_oss",
        {"sliding_window": WINDOW, "layer_types": SLIDING, **MOE}
        | {"intermediate_size": 64, "initializer_range": 0.2},
    ),
    "gemma2": (
        "gemma2",
        {"sliding_window": WINDOW, "layer_types": SLIDING}
        | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32}
        | {"initializer_range": 0.1}
        | TIED,
    ),
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 6, "sliding_window": WINDOW}
        | {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2}
        | {"query_pre_attn_scalar": 32},
    ),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4-shared": ("gemma4_text", GEMMA4 | {"num_kv_shared_layers": 3}),
    "laguna": (
        "laguna",
        {"sliding_window": WINDOW, "mlp_layer_types": ["dense"] * 4}
        | {"layer_types": [*SLIDING[:2], *reversed(SLIDING[:2])]}
        | {"num_attention_heads_per_layer": [4, 4, 8, 8]},
    ),
    "llama4": (
        "llama4_text",
        # vLLM wants whole blocks.
        {"attention_chunk_size": 64, "no_rope_layers": [1, 1, 1, 0], **MOE}
        | {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 128}
        | {"num_experts_per_tok": 1}
        | {"use_qk_norm": False, "attn_temperature_tuning": False},
    ),
    "lfm2": ("lfm2", HYBRID | LFM2 | TIED),
    "lfm2_moe": (
        "lfm2_moe",
        HYBRID | LFM2 | MOE | TIED | {"num_dense_layers": 1},
    ),
    "nemotron_h": ("nemotron_h", HYBRID | NEMOTRON_H),
    "falcon_h1": ("falcon_h1", HYBRID),
    "granitemoehybrid": (
        "granitemoehybrid",
        HYBRID
        | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 64}
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    ),
    "qwen3_next": (
        "qwen3_next",
        HYBRID | QWEN3_NEXT | {"initializer_range": 0.3},
    ),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4, "hidden_size": 128} | TIED),
}


def save(family: str, directory: Path) -> None:
    """Write config and seeded weights."""
    torch.manual_seed(0)
    if family == "decilm":
        tiny_decilm.save(directory, BASE)
        return
    model_type, changes = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(BASE | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(directory)
