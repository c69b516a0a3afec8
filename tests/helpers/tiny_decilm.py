# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint as Nemotron-NAS makes them: no two layers have the same KV heads.

Its configuration is code that comes with the checkpoint, as with the real ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

#: KV heads of every layer; None: it does not attend.
KV_HEADS = (2, 4, 2, None, 1)
_CONFIGURATION = """
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass
class Attention:
    no_op: bool
    n_heads_in_group: int | None


@dataclass
class FeedForward:
    no_op: bool = False
    ffn_mult: float = 1.5
    hidden_act: str = "silu"


@dataclass
class Block:
    attention: Attention
    ffn: FeedForward


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, heads_in_group=(), **values):
        super().__init__(**values)
        self.heads_in_group = list(heads_in_group)

    @property
    def block_configs(self):
        return [
            Block(Attention(count is None, count), FeedForward())
            for count in self.heads_in_group
        ]
"""


def save(directory: Path, base: dict[str, Any]) -> None:
    """Write configuration and seeded weights.

    Args:
        directory: It is filled.
        base: Values of a Llama's configuration.
    """
    heads = base["num_attention_heads"]
    # As the class computes it from ``ffn_mult``, in steps of 256.
    changes = {"intermediate_size": 256, "num_hidden_layers": len(KV_HEADS)}
    config = LlamaConfig(**(base | changes))
    weights = LlamaForCausalLM(config).state_dict()
    for layer, count in enumerate(KV_HEADS):
        prefix = f"model.layers.{layer}."
        if count is None:
            for name in [name for name in weights if name.startswith(prefix)]:
                if "self_attn" in name or "input_layernorm" in name:
                    del weights[name]
            continue
        rows = count * config.head_dim
        for name in ("k_proj", "v_proj"):
            weights[f"{prefix}self_attn.{name}.weight"] = config.initializer_range * (
                torch.randn(rows, config.hidden_size)
            )
    values = config.to_dict() | {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "heads_in_group": [count and heads // count for count in KV_HEADS],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "configuration_decilm.py").write_text(_CONFIGURATION)
    (directory / "config.json").write_text(json.dumps(values))
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    save_file(contiguous, directory / "model.safetensors", {"format": "pt"})
