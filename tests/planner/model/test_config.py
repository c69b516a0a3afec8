# SPDX-License-Identifier: Apache-2.0
"""Model shapes from public config.json values, against published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_attn_offload.planner.model.config import read_model_shape
from vllm_attn_offload.planner.model.layers import layer_shapes
from vllm_attn_offload.planner.model.parameters import count_parameters
from vllm_attn_offload.planner.model.shape import ModelShape

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("name", "params_b", "kv_bytes_per_token"),
    [
        # Published parameter counts; KV = 2 x layers x KV heads x head size x 2 bytes.
        ("llama-3-8b", 8.03, 2 * 32 * 8 * 128 * 2),
        ("llama-3-70b", 70.55, 327_680),
        ("qwen3-8b", 8.19, 2 * 36 * 8 * 128 * 2),
        ("mistral-7b-v0.1", 7.24, 2 * 32 * 8 * 128 * 2),
        ("gemma-2-9b", 9.24, 2 * 42 * 8 * 256 * 2),
        ("gpt-oss-20b", 20.9, 2 * 24 * 8 * 64 * 2),
        # MLA: one latent row of 512 + 64 per layer.
        ("deepseek-v2-lite", 15.7, 27 * 576 * 2),
    ],
)
def test_read_model_shape_published_sizes(
    shapes: dict[str, ModelShape],
    name: str,
    params_b: float,
    kv_bytes_per_token: int,
) -> None:
    shape = shapes[name]
    assert shape.num_params / 1e9 == pytest.approx(params_b, rel=0.002)
    assert shape.kv_bytes_per_token == kv_bytes_per_token


@pytest.mark.parametrize(
    "name", ["llama-3-8b", "gemma-2-9b", "gpt-oss-20b", "deepseek-v2-lite"]
)
def test_parameter_count_equals_transformers(
    shapes: dict[str, ModelShape], name: str
) -> None:
    """The real model class, built without memory, has the counted parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(CONFIGS / name)
    config.num_hidden_layers = 2
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:2]
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    values = config.to_dict()
    count = count_parameters(values, layer_shapes(values, name))
    counted = count.linear + count.experts + count.lm_head + count.embedding
    real = sum(p.numel() for p in model.parameters())
    assert counted == pytest.approx(real, rel=1e-3)


def test_window_caps_kv(shapes: dict[str, ModelShape]) -> None:
    gemma, mistral = shapes["gemma-2-9b"], shapes["mistral-7b-v0.1"]
    per_layer = 8 * 256 * 2 * 2
    assert gemma.kv_bytes(8192) == 21 * per_layer * (8192 + 4096)
    assert mistral.kv_bytes(32768) == mistral.kv_bytes(4096)


def test_moe_streams_touched_experts(shapes: dict[str, ModelShape]) -> None:
    shape = shapes["gpt-oss-20b"]
    one = shape.streamed_bytes(1) - shape.dense_bytes
    assert one == pytest.approx(shape.expert_bytes * 4 / 32)
    assert shape.streamed_bytes(1000) == pytest.approx(
        shape.dense_bytes + shape.expert_bytes
    )
    # MXFP4 checkpoint on the hub: 13.8 GB.
    assert shape.weight_bytes / 1e9 == pytest.approx(13.8, rel=0.02)


@pytest.mark.parametrize("kv_dtype", ["fp8", "fp8_e4m3"])
def test_fp8_kv_cache_halves_what_nodes_hold(
    shapes: dict[str, ModelShape], kv_dtype: str
) -> None:
    """What travels stays as it is."""
    whole = shapes["llama-3-8b"]
    shape = read_model_shape(str(CONFIGS / "llama-3-8b"), kv_dtype)
    assert shape.kv_bytes_per_token == whole.kv_bytes_per_token / 2
    assert shape.activation_bytes == whole.activation_bytes


@pytest.mark.parametrize(
    ("quantization", "kv_bytes"),
    [
        (
            {
                "quant_method": "compressed-tensors",
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            1,
        ),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, 2),
        (
            {
                "quant_method": "modelopt",
                "quantization": {"kv_cache_quant_algo": "FP8"},
            },
            1,
        ),
        (
            {
                "quant_method": "modelopt",
                "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
            },
            1,
        ),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": None}, 2),
    ],
    ids=["scheme", "no scheme", "modelopt", "modelopt scheme", "modelopt without"],
)
def test_auto_is_what_the_checkpoint_asks_for(
    tmp_path: Path, quantization: dict[str, object], kv_bytes: int
) -> None:
    config = json.loads((CONFIGS / "llama-3-8b" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"quantization_config": quantization}))
    assert read_model_shape(str(path), weight_bits=16).kv_element_bytes == kv_bytes
    shape = read_model_shape(str(path), "bfloat16", weight_bits=16)
    assert shape.kv_element_bytes == 2


def test_read_model_shape_from_directory(shapes: dict[str, ModelShape]) -> None:
    name = "llama-3-8b"
    assert read_model_shape(str(CONFIGS / name)) == shapes[name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "No config.json"),
        ({"hidden_size": 8}, "names no model_type"),
        ({"model_type": "no-such-model"}, "unknown to the installed"),
        ({"model_type": "vit"}, "has no vocab_size"),
    ],
)
def test_read_model_shape_bad_model(
    tmp_path: Path, config: dict[str, object] | None, message: str
) -> None:
    path = tmp_path / "config.json"
    if config is not None:
        path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_model_shape(str(path))
