# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of targets and of what drafts for them.

Embeddings outweigh the random layers, and the head of a target has each token's
embedding in the row of the token that follows it in a short ring. So a target mostly
goes round in rings, which n-grams and heads with the same idea guess, but not always.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_families import BASE
from transformers import AutoConfig, AutoModelForCausalLM

RING = 8
HIDDEN, VOCABULARY = 128, BASE["vocab_size"]
TARGET: dict[str, Any] = BASE | {
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "initializer_range": 0.1,
}
#: Of embeddings. Layers add about as much, so a target leaves its ring at times.
EMBEDDING_SCALE, HEAD_SCALE = 1.0, 0.25
#: Of draft heads, which have one layer.
QUIET, LOUD = 0.02, 0.3
#: Type of transformers' config, vLLM's class, and what differs from ``TARGET``.
TARGETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {}),
    "mimo": ("qwen2", "MiMoForCausalLM", {"num_nextn_predict_layers": 1}),
}


def save(name: str, directory: Path) -> None:
    """Write config and seeded weights."""
    torch.manual_seed(0)
    directory.mkdir(parents=True)
    if name in TARGETS:
        _save_target(name, directory)
    else:
        _HEADS[name](directory)


def _save_target(name: str, directory: Path) -> None:
    model_type, architecture, changes = TARGETS[name]
    config = AutoConfig.for_model(model_type, **TARGET | changes)
    model = AutoModelForCausalLM.from_config(config).float()
    embeddings, head = _ends()
    model.get_input_embeddings().weight.data.copy_(embeddings)
    model.get_output_embeddings().weight.data.copy_(head)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    config.architectures = [architecture]
    if name == "mimo":
        weights |= _mtp_weights()
    config.save_pretrained(directory)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _ends() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and head, both ``[VOCABULARY, HIDDEN]``."""
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    tokens = torch.arange(VOCABULARY)
    previous = tokens - tokens % RING + (tokens - 1) % RING
    return EMBEDDING_SCALE * embeddings, HEAD_SCALE * embeddings[previous]


def _layer_weights(
    prefix: str, scale: float, num_kv_heads: int, size_in: int = HIDDEN
) -> dict[str, torch.Tensor]:
    """A decoder layer, whose attention reads ``size_in`` numbers of a token."""
    head_size, wide = TARGET["head_dim"], TARGET["intermediate_size"]
    rows = TARGET["num_attention_heads"] * head_size
    shapes = {
        "self_attn.q_proj": (rows, size_in),
        "self_attn.k_proj": (num_kv_heads * head_size, size_in),
        "self_attn.v_proj": (num_kv_heads * head_size, size_in),
        "self_attn.o_proj": (HIDDEN, rows),
        "mlp.gate_proj": (wide, HIDDEN),
        "mlp.up_proj": (wide, HIDDEN),
        "mlp.down_proj": (HIDDEN, wide),
    }
    names = ("input_layernorm", "post_attention_layernorm")
    return {
        f"{prefix}{name}.weight": scale * torch.randn(shape)
        for name, shape in shapes.items()
    } | {f"{prefix}{name}.weight": torch.ones(HIDDEN) for name in names}


def _mtp_weights() -> dict[str, torch.Tensor]:
    """A layer that predicts from the embedding of the token before."""
    prefix = "model.mtp_layers.0."
    projection = torch.cat([torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)], dim=1)
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    biases = {
        f"{prefix}self_attn.{name}_proj.bias": torch.zeros(heads * TARGET["head_dim"])
        for name, heads in {"q": 4, "k": 2, "v": 2}.items()
    }
    return {
        f"{prefix}input_proj.weight": projection,
        **{f"{prefix}{name}.weight": torch.ones(HIDDEN) for name in norms},
        **_layer_weights(prefix, QUIET, num_kv_heads=2),
        **biases,
    }


def _save_head(
    directory: Path, weights: dict[str, torch.Tensor], **options: Any
) -> None:
    config = AutoConfig.for_model(
        "llama", **TARGET | options | {"num_hidden_layers": 1}
    )
    config.save_pretrained(directory)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _save_eagle(directory: Path) -> None:
    """Guesses well; as many KV heads as the target."""
    projection = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1)
    weights = _layer_weights("layers.0.", QUIET, num_kv_heads=2)
    del weights["layers.0.input_layernorm.weight"]
    _save_head(
        directory,
        weights | {"fc.weight": projection},
        architectures=["LlamaForCausalLM"],
    )


def _save_eagle3(directory: Path) -> None:
    """Guesses nothing from three layers; with more KV heads than the target."""
    weights = _layer_weights("midlayer.", LOUD, num_kv_heads=4, size_in=2 * HIDDEN)
    weights |= {
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "fc.weight": LOUD * torch.randn(HIDDEN, 3 * HIDDEN),
        "lm_head.weight": _ends()[1],
    }
    _save_head(
        directory,
        weights,
        architectures=["LlamaForCausalLMEagle3"],
        num_key_value_heads=4,
        draft_vocab_size=VOCABULARY,
        eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
    )


_HEADS = {
    "eagle": _save_eagle,
    "eagle3": _save_eagle3,
}
NAMES = [*TARGETS, *_HEADS]
