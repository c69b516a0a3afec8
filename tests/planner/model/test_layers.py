# SPDX-License-Identifier: Apache-2.0
"""KV bytes per token of real checkpoints, which each family's config spells its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_attn_offload.planner.model.config import read_configs, read_model_shape
from vllm_attn_offload.planner.model.layers import layer_shapes

# bfloat16 keys and values: 2 x 2 bytes per element pair. MLA keeps one row of 576.
KV, ROW = 4, 2 * (512 + 64)
FALCON: dict[str, Any] = {"model_type": "falcon", "vocab_size": 65024}
LATENT: dict[str, Any] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
REAL: dict[str, tuple[int, dict[str, Any]]] = {
    "falcon-7b": (
        32 * 1 * 64 * KV,
        FALCON
        | {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32}
        | {"multi_query": True, "new_decoder_architecture": False},
    ),
    "falcon-40b": (
        60 * 8 * 64 * KV,
        FALCON
        | {"hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60}
        | {"num_kv_heads": 8, "multi_query": True, "new_decoder_architecture": True},
    ),
    "falcon-40b-n_head_kv": (
        60 * 8 * 64 * KV,
        FALCON
        | {"hidden_size": 8192, "n_head": 128, "n_layer": 60, "n_head_kv": 8}
        | {"num_attention_heads": 128, "num_hidden_layers": 60}
        | {"multi_query": True, "new_decoder_architecture": True},
    ),
    "falcon-rw-1b": (
        24 * 32 * 64 * KV,
        FALCON
        | {"hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24}
        | {"multi_query": False, "alibi": True},
    ),
    "starcoder": (
        40 * 1 * 128 * KV,
        {"model_type": "gpt_bigcode", "n_embd": 6144, "n_head": 48, "n_layer": 40}
        | {"multi_query": True, "vocab_size": 49152},
    ),
    "dbrx": (
        40 * 8 * 128 * KV,
        {"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40}
        | {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5}, "vocab_size": 100352},
    ),
    "mpt-7b": (
        32 * 32 * 128 * KV,
        {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32}
        | {"vocab_size": 50432},
    ),
    "gpt2": (12 * 12 * 64 * KV, {"model_type": "gpt2"}),
    "qwen2-7b": (
        28 * 4 * 128 * KV,
        {"model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28}
        | {"num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064}
        | {"use_sliding_window": False, "sliding_window": 131072}
        | {"max_window_layers": 28},
    ),
    "mixtral-8x7b": (
        32 * 8 * 128 * KV,
        LLAMA | {"model_type": "mixtral", "num_local_experts": 8},
    ),
    "gemma-7b": (
        28 * 16 * 256 * KV,
        {"model_type": "gemma", "hidden_size": 3072, "num_attention_heads": 16}
        | {"num_hidden_layers": 28, "num_key_value_heads": 16, "head_dim": 256},
    ),
    # The last 10 of 30 layers read what earlier ones keep.
    "gemma-3n-e2b": (
        20 * 2 * 256 * KV,
        {"model_type": "gemma3n_text", "hidden_size": 2048, "num_hidden_layers": 30}
        | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256}
        | {"num_kv_shared_layers": 10, "intermediate_size": [8192] * 30},
    ),
    # Every sixth layer attends to everything, with heads twice as large.
    "gemma-4": (
        25 * 4 * 256 * KV + 5 * 4 * 512 * KV,
        {"model_type": "gemma4_text", "num_hidden_layers": 30, "head_dim": 256}
        | {"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "deepseek-v3": (
        61 * ROW,
        {"model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168}
        | {"num_attention_heads": 128, **LATENT},
    ),
    # A head_dim in the file must not replace the rope part of the latent row.
    "kimi-k2": (
        61 * ROW,
        {"model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168}
        | {"num_attention_heads": 64, "head_dim": 128, **LATENT},
    ),
    "longcat-flash": (
        2 * 28 * ROW,
        {"model_type": "longcat_flash", "num_layers": 28, "hidden_size": 6144}
        | {"num_attention_heads": 64, **LATENT},
    ),
    # vLLM expands its latent rows: 64 + 32 for keys, and for padded values.
    "minicpm3-4b": (
        62 * 40 * 96 * KV,
        {"model_type": "minicpm3", "hidden_size": 2560, "num_hidden_layers": 62}
        | {"num_attention_heads": 40, "num_key_value_heads": 40}
        | LATENT
        | {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
    ),
    # One layer in eight attends.
    "jamba": (
        4 * 8 * 128 * KV,
        LLAMA
        | {"model_type": "jamba", "attn_layer_period": 8, "attn_layer_offset": 4}
        | {"num_experts": 16, "vocab_size": 65536},
    ),
    "zamba2-2.7b": (
        9 * 32 * 160 * KV,
        {"model_type": "zamba2", "hidden_size": 2560, "num_hidden_layers": 54}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
        | {"layers_block_type": (["mamba"] * 5 + ["hybrid"]) * 9},
    ),
    "granite-4.0-h": (
        4 * 4 * 128 * KV,
        {"model_type": "granitemoehybrid", "hidden_size": 1536, "vocab_size": 100352}
        | {"num_attention_heads": 12, "num_key_value_heads": 4}
        | {"num_hidden_layers": 40}
        | {"layer_types": (["mamba"] * 9 + ["attention"]) * 4},
    ),
    "qwen3-next": (
        12 * 2 * 256 * KV,
        {"model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256},
    ),
    "lfm2-1.2b": (
        6 * 8 * 64 * KV,
        {"model_type": "lfm2", "hidden_size": 2048, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8}
        | {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "vocab_size": 65536},
    ),
    "falcon-h1": (32 * 8 * 128 * KV, LLAMA | {"model_type": "falcon_h1"}),
    # 192 for keys and 128 for values; sliding layers have twice the heads.
    "mimo-v2-flash": (
        2 * 320 * (9 * 4 + 39 * 8),
        {"model_type": "mimo_v2_flash", "num_hidden_layers": 48, "head_dim": 192}
        | {"num_attention_heads": 64, "num_key_value_heads": 4, "v_head_dim": 128}
        | {"swa_num_attention_heads": 64, "swa_num_key_value_heads": 8}
        | {"swa_head_dim": 192, "swa_v_head_dim": 128, "sliding_window": 128}
        | {"hidden_size": 4096},
    ),
    "llava-of-llama": (
        32 * 8 * 128 * KV,
        {"model_type": "llava", "text_config": LLAMA},
    ),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every checkpoint, through transformers' class of its family."""
    folder = tmp_path_factory.mktemp("real")
    paths = [folder / f"{name}.json" for name in REAL]
    for path in paths:
        path.write_text(json.dumps(REAL[path.stem][1]))
    return {
        path.stem: config
        for path, config in zip(paths, read_configs(paths), strict=True)
    }


@pytest.mark.parametrize("name", REAL)
def test_kv_bytes_per_token(configs: dict[str, dict[str, Any]], name: str) -> None:
    layers = layer_shapes(configs[name], name)
    elements = sum(g.num_layers * g.kv_elements for g in layers if not g.shares_kv)
    assert 2 * elements == REAL[name][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": -1}, "num_key_value_heads=-1.*whole number above 0"),
        (
            {"layer_types": ["full_attention", "window_attention"] * 16},
            "layers of type window_attention.*knows.*Use another model",
        ),
        (
            {"layer_types": ["full_attention"]},
            "1 layer_types and 32 layers.*one for each.*Correct",
        ),
        ({"num_kv_shared_layers": 32}, "32 layers, and num_kv_sh.*must keep.*Correct"),
        ({"layer_types": None}, "does not say which layers attend.*needs.*Add"),
        ({"layer_types": ["conv"] * 32}, "No layer of it attends.*needs.*Use another"),
        ({"index_topk": 2048}, "attends sparsely .index_topk=2048.*Use another model"),
        (
            {"model_type": "mistral4", **LATENT},
            "does not know if vLLM caches its latent rows. Known: .*deepseek_v3.*Use",
        ),
        ({"is_encoder_decoder": True}, "encoder-decoder.*decoder-only.*Use another"),
    ],
)
def test_refuses_what_it_cannot_describe(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_shapes(LLAMA | change, "it")


def test_shared_layers_read_but_keep_nothing(tmp_path: Path) -> None:
    """Gemma-3n's last layers: their reads cost time, and no k and v go to a node."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(REAL["gemma-3n-e2b"][1]))
    shape = read_model_shape(str(path))
    per_layer = 2 * 256 * KV
    assert shape.num_layers == 30
    assert shape.kv_bytes(1) == 20 * per_layer
    assert shape.kv_read_bytes(1) == 30 * per_layer
    q_and_out = 2 * 8 * 256 * 2
    assert shape.wire_bytes() == 30 * q_and_out + 20 * per_layer


def test_hybrid_weights_are_those_of_its_class(tmp_path: Path) -> None:
    """Jamba has state-space layers, and 16 experts in every other layer."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(REAL["jamba"][1] | {"intermediate_size": 14336}))
    shape = read_model_shape(str(path))
    assert shape.kv_bytes_per_token == REAL["jamba"][0]
    # Published: 52B in all, 12B of them active.
    assert shape.num_params / 1e9 == pytest.approx(51.6, abs=0.1)
    assert shape.flops_per_token / 2e9 == pytest.approx(12, abs=0.5)


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    """ChatGLM's class exists only in vLLM."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "chatglm", "multi_query_group_num": 2}))
    with pytest.raises(ValueError, match="'chatglm'.*unknown to the installed"):
        read_model_shape(str(path))


def test_family_without_a_class_to_count_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "diffusion_gemma_text"}))
    message = "cannot be counted: .*no model for diffusion_gemma_text.*Update"
    with pytest.raises(ValueError, match=message):
        read_model_shape(str(path))
