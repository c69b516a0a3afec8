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
