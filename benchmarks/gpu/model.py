# SPDX-License-Identifier: Apache-2.0
"""Llamas with seeded random weights, and the engine options that suit them.

Nothing is downloaded. The weights are large enough for tokens to depend on what
attention returns.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

NUM_TOKENS = 16
MAX_MODEL_LEN = 256
Shape = dict[str, Any]

DRY_SHAPE: Shape = {
    "vocab_size": 40960,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.3,
}
#: Llama-3-8B with 4 layers; tied, because a second table of words says nothing new.
LLAMA_8B_SHAPE: Shape = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "initializer_range": 0.03,
    "tie_word_embeddings": True,
}


def save(directory: Path, shape: Shape, device: str) -> None:
    """Write config and seeded weights (bf16 on a GPU); there is no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(directory)


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="attn-offload-model-")


def saved(*, is_dry: bool) -> Path:
    """A directory with the model, made once; it goes with this process."""
    path = Path(_directory().name, "dry" if is_dry else "llama-8b")
    if not path.exists():
        save(path, DRY_SHAPE if is_dry else LLAMA_8B_SHAPE, "cpu" if is_dry else "cuda")
    return path


def kv_bytes_per_token(shape: Shape, element_bytes: int) -> int:
    """Keys and values of one token in all layers."""
    heads = shape["num_key_value_heads"] * shape["head_dim"]
    return int(2 * heads * shape["num_hidden_layers"] * element_bytes)


def prompts() -> list[list[int]]:
    """Chunks of one, a few and many blocks, and one that is cached from the start."""
    draw = random.Random(0)
    sizes = (1, 7, 33, 70, 150)
    drawn = [draw.choices(range(1000, 40000), k=size) for size in sizes]
    return [*drawn, drawn[-1][:96] + drawn[1]]


def engine_options(*, is_dry: bool) -> dict[str, Any]:
    """Options that stock and offloading engines share."""
    common: dict[str, Any] = {"skip_tokenizer_init": True, "seed": 0}
    if is_dry:
        return common | {
            "dtype": "float32",
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": 4,
            "max_num_batched_tokens": MAX_MODEL_LEN,
            "block_size": 32,
            "enforce_eager": True,
        }
    return common | {
        "dtype": "bfloat16",
        "max_model_len": 8192 + 256,
        "max_num_seqs": 256,
    }
