# SPDX-License-Identifier: Apache-2.0
"""Recurrent states of a configuration, by vLLM's rule for each family.

They stay on the compute devices. vLLM's CPU build widens some of a model's own 16-bit
ones to 32 bit where the CPU computes in bfloat16; that is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_attn_offload.planner.model.layers import ATTENDING, config_size, layer_kinds
from vllm_attn_offload.planner.model.shape import StateShape

# Of layers.py's kinds. "hybrid" layers attend, too.
RECURRENT = ("linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding")
# Names of a Mamba-2 mixer's heads, head size, groups, state size and convolution.
MAMBA_NAMES = (
    *("mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    *("mamba_d_state", "mamba_d_conv"),
)
MAMBA2 = {
    "bamba": MAMBA_NAMES,
    "falcon_h1": MAMBA_NAMES,
    "granitemoehybrid": MAMBA_NAMES,
    "nemotron_h": (
        *("mamba_num_heads", "mamba_head_dim", "n_groups"),
        *("ssm_state_size", "conv_kernel"),
    ),
    "zamba2": (
        *("n_mamba_heads", "mamba_headdim", "mamba_ngroups"),
        *("mamba_d_state", "mamba_d_conv"),
    ),
}
# The value that names the dtype of a family's sums, and what holds without it. vLLM
# reads it of no other family, and keeps theirs in the model's dtype.
SUM_DTYPE: Mapping[str, tuple[str, str | None]] = {
    "kimi_linear": ("", "float32"),
    "nemotron_h": ("mamba_ssm_cache_dtype", "float32"),
    "qwen3_5_text": ("mamba_ssm_dtype", None),
    "qwen3_5_moe_text": ("mamba_ssm_dtype", None),
}
DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}

# Elements of the inputs that a convolution still needs, and of sums over all tokens.
Elements = tuple[int, int]


def recurrent_states(
    config: Mapping[str, Any], name: str, element_bytes: float
) -> StateShape | None:
    """Layers of `config` that keep a state of fixed size per request; None: no layer.

    Args:
        element_bytes: Bytes per element of the model's dtype.

    Raises:
        ValueError: States that the planner cannot describe.
    """
    kinds = [kind for kind in layer_kinds(config, name) if kind in RECURRENT]
    if not kinds:
        return None
    family = str(config.get("model_type"))
    if family not in RULES:
        raise ValueError(
            f"{name} ({family}) has layers of type {', '.join(sorted(set(kinds)))}; "
            "the planner does not know the size of their states. Known: "
            f"{', '.join(sorted(RULES))}. Use a model of one of these families."
        )
    inputs, sums = RULES[family](config, name)
    return StateShape(
        num_layers=len(kinds),
        num_attending=sum(kind in ATTENDING for kind in kinds),
        layer_bytes=inputs * element_bytes
        + sums * _sum_bytes(config, name, family, element_bytes),
        num_held=3 if family in MAMBA2 else 2,
    )


def _sum_bytes(
    config: Mapping[str, Any], name: str, family: str, element_bytes: float
) -> float:
    key, default = SUM_DTYPE.get(family, ("", None))
    dtype = config.get(key) or default
    if dtype is None:
        return element_bytes
    if dtype not in DTYPE_BYTES:
        raise ValueError(
            f"The config of {name} has {key}={dtype!r}. Allowed: "
            f"{', '.join(DTYPE_BYTES)}. Correct the config.json."
        )
    return DTYPE_BYTES[dtype]


def _gated_delta_net(config: Mapping[str, Any], name: str) -> Elements:
    keys, values, key_size, value_size, kernel = (
        config_size(config, name, f"linear_{key}")
        for key in (
            *("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"),
            "conv_kernel_dim",
        )
    )
    inputs = (kernel - 1) * (2 * keys * key_size + values * value_size)
    return inputs, values * value_size * key_size


def _kimi_delta(config: Mapping[str, Any], name: str) -> Elements:
    heads, size, kernel = (
        config_size(config, name, f"linear_{key}")
        for key in ("num_heads", "head_dim", "conv_kernel_dim")
    )
    return (kernel - 1) * 3 * heads * size, heads * size * size


def _mamba1(config: Mapping[str, Any], name: str) -> Elements:
    expand, hidden, state, kernel = (
        config_size(config, name, key)
        for key in ("mamba_expand", "hidden_size", "mamba_d_state", "mamba_d_conv")
    )
    return (kernel - 1) * expand * hidden, expand * hidden * state


def _mamba2(config: Mapping[str, Any], name: str) -> Elements:
    heads, size, groups, state, kernel = (
        config_size(config, name, key) for key in MAMBA2[config["model_type"]]
    )
    return (kernel - 1) * (heads * size + 2 * groups * state), heads * size * state


def _short_convolution(config: Mapping[str, Any], name: str) -> Elements:
    width = config_size(config, name, "conv_dim", "hidden_size")
    return (config_size(config, name, "conv_L_cache") - 1) * width, 0


RULES: Mapping[str, Callable[[Mapping[str, Any], str], Elements]] = {
    "jamba": _mamba1,
    "kimi_linear": _kimi_delta,
    "lfm2": _short_convolution,
    "lfm2_moe": _short_convolution,
    "olmo_hybrid": _gated_delta_net,
    "qwen3_5_moe_text": _gated_delta_net,
    "qwen3_5_text": _gated_delta_net,
    "qwen3_next": _gated_delta_net,
    **dict.fromkeys(MAMBA2, _mamba2),
}
