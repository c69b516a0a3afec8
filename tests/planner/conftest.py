# SPDX-License-Identifier: Apache-2.0
"""Shapes read once per session, the paper's hardware, and the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_attn_offload.planner.hardware.catalogue import Catalogue, load_catalogue
from vllm_attn_offload.planner.model.config import (
    read_configs,
    read_model_shape,
    shape_from_config,
)
from vllm_attn_offload.planner.model.shape import ModelShape

CONFIGS = Path(__file__).with_name("configs")


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return load_catalogue()


@pytest.fixture(scope="session")
def shapes() -> dict[str, ModelShape]:
    """Every fixture model, through the real transformers config classes."""
    paths = sorted(CONFIGS.glob("*/config.json"))
    return {
        path.parent.name: shape_from_config(config, path.parent.name)
        for path, config in zip(paths, read_configs(paths), strict=True)
    }


@pytest.fixture(scope="session")
def qwen36_27b(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """Three layers with gated delta nets for each one that attends, as Qwen3.6-27B."""
    path = tmp_path_factory.mktemp("qwen3.6-27b")
    text = {
        **{"model_type": "qwen3_5_text", "dtype": "bfloat16", "hidden_size": 5120},
        **{"intermediate_size": 17408, "vocab_size": 248320, "num_hidden_layers": 64},
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 16,
        **{"num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256},
        **{"linear_num_key_heads": 16, "linear_key_head_dim": 128},
        **{"linear_num_value_heads": 48, "linear_value_head_dim": 128},
        **{"linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32"},
    }
    config = {"model_type": "qwen3_5", "text_config": text}
    (path / "config.json").write_text(json.dumps(config))
    return read_model_shape(str(path))
