# SPDX-License-Identifier: Apache-2.0
"""Bytes of recurrent states, by hand from public checkpoints' values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_attn_offload.planner.model.config import read_configs
from vllm_attn_offload.planner.model.layers import layer_shapes
from vllm_attn_offload.planner.model.shape import ModelShape
from vllm_attn_offload.planner.model.states import recurrent_states

ONE_OF_FOUR = [*["linear_attention"] * 3, "full_attention"]
QWEN35: dict[str, Any] = {
    **{"model_type": "qwen3_5_moe_text", "num_hidden_layers": 40},
    **{"layer_types": ONE_OF_FOUR * 10, "linear_conv_kernel_dim": 4},
    **{"linear_num_key_heads": 16, "linear_key_head_dim": 128},
    **{"linear_num_value_heads": 32, "linear_value_head_dim": 128},
}
QWEN35_INPUTS, QWEN35_SUMS = 3 * (2 * 16 * 128 + 32 * 128), 32 * 128 * 128
BAMBA: dict[str, Any] = {
    **{"model_type": "bamba", "num_hidden_layers": 32},
    "layer_types": [*["mamba"] * 31, "full_attention"],
    **{"mamba_n_heads": 128, "mamba_d_head": 64, "mamba_n_groups": 1},
    **{"mamba_d_state": 128, "mamba_d_conv": 4},
}
# Layers that attend, that keep a state, that do both, and how checkpoints say so.
SPELLINGS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "nemotron-h": (
        *(1, 3, 0),
        {"model_type": "nemotron_h", "hybrid_override_pattern": "MEM-M*E"},
    ),
    "nemotron-3": (
        *(1, 2, 0),
        {"model_type": "nemotron_h"}
        | {"layers_block_type": ["mamba", "moe", "mamba", "attention", "moe"]},
    ),
    "bamba": (
        *(2, 4, 0),
        {"model_type": "bamba", "num_hidden_layers": 6, "attn_layer_indices": [1, 4]},
    ),
    "jamba": (
        *(2, 6, 0),
        {"model_type": "jamba", "num_hidden_layers": 8}
        | {"attn_layer_period": 4, "attn_layer_offset": 2},
    ),
    "granite-4-h": (
        *(1, 3, 0),
        {"model_type": "granitemoehybrid", "num_hidden_layers": 4}
        | {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
    ),
    "zamba2": (
        *(1, 4, 1),
        {"model_type": "zamba2", "num_hidden_layers": 4}
        | {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"]},
    ),
    "falcon-h1": (4, 4, 4, {"model_type": "falcon_h1", "num_hidden_layers": 4}),
    "lfm2": (
        *(2, 4, 0),
        {"model_type": "lfm2", "num_hidden_layers": 6, "full_attn_idxs": [2, 5]},
    ),
    "qwen3.5": (
        *(4, 4, 0),
        {"model_type": "qwen3_5_text", "num_hidden_layers": 8}
        | {"full_attention_interval": 2},
    ),
    "kimi-linear": (
        *(1, 3, 0),
        {"model_type": "kimi_linear", "num_hidden_layers": 4}
        | {"linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [4]}},
    ),
}


def test_states_of_qwen36_27b(qwen36_27b: ModelShape) -> None:
    states = qwen36_27b.states
    assert states is not None
    # Convolution inputs in bfloat16, sums in float32.
    inputs, sums = 3 * (2 * 16 * 128 + 48 * 128), 48 * 128 * 128
    assert states.layer_bytes == 2 * inputs + 4 * sums
    assert (states.num_layers, states.num_attending) == (48, 0)
    assert qwen36_27b.state_bytes == 153_944_064
    assert qwen36_27b.kv_bytes_per_token == 16 * 2 * 4 * 256 * 2
    assert (qwen36_27b.num_layers, qwen36_27b.num_mixing_layers) == (16, 64)
    assert qwen36_27b.num_params == pytest.approx(27e9, rel=0.02)


@pytest.mark.parametrize(
    ("config", "element_bytes", "layers", "layer_bytes"),
    [
        (QWEN35, 2, 30, 2 * (QWEN35_INPUTS + QWEN35_SUMS)),
        (QWEN35, 4, 30, 4 * (QWEN35_INPUTS + QWEN35_SUMS)),
        (
            QWEN35 | {"mamba_ssm_dtype": "float32"},
            *(2, 30, 2 * QWEN35_INPUTS + 4 * QWEN35_SUMS),
        ),
        # vLLM reads that value of Qwen3.5 alone.
        (
            QWEN35 | {"model_type": "qwen3_next", "mamba_ssm_dtype": "float32"},
            *(2, 30, 2 * (QWEN35_INPUTS + QWEN35_SUMS)),
        ),
        (BAMBA, 2, 31, 2 * (3 * (8192 + 2 * 128) + 8192 * 128)),
    ],
)
def test_states_by_hand(
    config: dict[str, Any], element_bytes: float, layers: int, layer_bytes: float
) -> None:
    states = recurrent_states(config, "model", element_bytes)
    assert states is not None
    assert states.num_layers == layers
    assert states.layer_bytes == layer_bytes


def test_mamba2_holds_one_more(qwen36_27b: ModelShape) -> None:
    """The state within a prompt that its prefix caching asks for."""
    states = recurrent_states(BAMBA, "model", 2)
    assert states is not None
    assert states.num_held == 3
    assert qwen36_27b.held_state_bytes == 2 * qwen36_27b.state_bytes


def test_layers_that_also_attend_count_once() -> None:
    config = BAMBA | {"model_type": "falcon_h1", "layer_types": ["hybrid"] * 32}
    states = recurrent_states(config, "model", 2)
    assert states is not None
    assert (states.num_layers, states.num_attending) == (32, 32)


def test_models_without_states(shapes: dict[str, ModelShape]) -> None:
    for shape in shapes.values():
        assert shape.states is None
        assert shape.state_bytes == 0
        assert shape.num_mixing_layers == shape.num_layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "minimax"},
            r"model \(minimax\) .* Known: bamba, .* Use a model",
        ),
        ({"mamba_n_heads": 0}, r"mamba_n_heads=None\. It must be .* Correct"),
        (
            QWEN35 | {"mamba_ssm_dtype": "float8"},
            r"mamba_ssm_dtype='float8'\. Allowed: float32, .* Correct",
        ),
    ],
)
def test_states_that_cannot_be_told_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recurrent_states(BAMBA | change, "model", 2)


def test_kinds_of_layers_as_checkpoints_spell_them(tmp_path: Path) -> None:
    paths = [tmp_path / name / "config.json" for name in SPELLINGS]
    for path, (_, _, _, config) in zip(paths, SPELLINGS.values(), strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps(config))
    for path, config in zip(paths, read_configs(paths), strict=True):
        name = path.parent.name
        states = recurrent_states(config, name, 2)
        assert states is not None
        attending = sum(group.num_layers for group in layer_shapes(config, name))
        found = (attending, states.num_layers, states.num_attending)
        assert found == SPELLINGS[name][:3], name
