# SPDX-License-Identifier: Apache-2.0
"""Attention layers of a configuration, by vLLM's rule for each family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_attn_offload.planner.model.shape import LayerShape, gqa_layers, mla_layers

# Names in transformers' layer_types, and the attribute with the window of such layers.
# "hybrid" layers attend beside a convolution or a state-space mixer.
ATTENDING = {
    "attention": None,
    "full_attention": None,
    "hybrid": None,
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
# Layers that keep a state of fixed size per request, or nothing.
WITHOUT_KV = ("linear_attention", "mamba", "conv", "moe", "mlp")
# In the order in which vLLM looks for them.
KV_HEADS = (
    "n_head_kv",
    "num_kv_heads",
    "num_key_value_heads",
    "multi_query_group_num",
    "num_attention_groups",
)
HEAD_SIZE = ("head_dim", "hidden_size_per_head")
# Only these keep the latent row in vLLM; MiniCPM3 keeps keys and values of every head.
LATENT = frozenset(
    ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "kimi_linear")
    + ("longcat_flash", "pangu_ultra_moe")
)
EXPANDED_LATENT = frozenset(("minicpm3",))
# Their windows do not count the query's own token.
OPEN_WINDOW = frozenset(("cohere2", "cohere2_moe"))
# A second cache of the tokens, of which a query reads some: not a number per layer.
INDEXER = ("index_topk", "index_n_heads", "indexer_n_heads", "compress_ratios")


def layer_shapes(config: Mapping[str, Any], name: str) -> tuple[LayerShape, ...]:
    """Layers of `config` that attend, equal ones together.

    Raises:
        ValueError: Attention that the planner cannot describe.
    """
    _refuse_unknown(config, name)
    num_layers = config["num_hidden_layers"]
    kinds = layer_kinds(config, name)
    own_kv = num_layers - (config.get("num_kv_shared_layers") or 0)
    if own_kv < 1:
        raise ValueError(
            f"{name} has {num_layers} layers, and num_kv_shared_layers="
            f"{config['num_kv_shared_layers']}. Some must keep keys and values. "
            "Correct the config.json."
        )
    overrides = {int(k): v for k, v in (config.get("per_layer_config") or {}).items()}
    shapes = Counter(
        replace(
            _layer_shape({**config, **overrides.get(i, {})}, name, kind, i),
            shares_kv=i >= own_kv,
        )
        for i, kind in enumerate(kinds)
        if kind in ATTENDING
    )
    if not shapes:
        raise ValueError(
            f"No layer of {name} attends. The planner needs a model that keeps keys "
            "and values. Use another model."
        )
    return tuple(replace(shape, num_layers=n) for shape, n in shapes.items())


def _refuse_unknown(config: Mapping[str, Any], name: str) -> None:
    if config.get("is_encoder_decoder"):
        raise ValueError(
            f"{name} is an encoder-decoder model, which also keeps KV of its input. "
            "The planner describes decoder-only models. Use another model."
        )
    indexer = next((key for key in INDEXER if config.get(key)), None)
    if indexer:
        raise ValueError(
            f"{name} attends sparsely ({indexer}={config[indexer]}). The planner "
            "describes attention that reads every cached token or a window of them. "
            "Use another model."
        )
    family = config.get("model_type")
    if config.get("kv_lora_rank") and family not in LATENT | EXPANDED_LATENT:
        raise ValueError(
            f"{name} ({family}) has kv_lora_rank; the planner does not know if vLLM "
            f"caches its latent rows. Known: {', '.join(sorted(LATENT))}. Use a model "
            "of one of these families, or one without kv_lora_rank."
        )


def layer_kinds(config: Mapping[str, Any], name: str) -> list[str]:
    """One of ATTENDING or WITHOUT_KV per layer.

    Raises:
        ValueError: No kinds, unknown ones, or not one for each layer.
    """
    window = config.get("sliding_window")
    if config.get("use_sliding_window") is False:
        window = None
    default = "sliding_attention" if window else "full_attention"
    num_layers = config["num_hidden_layers"]
    kinds = config.get("layer_types", [default] * num_layers)
    if kinds is None:
        raise ValueError(
            f"The config of {name} does not say which layers attend. Its family needs "
            "layer_types. Add the list to the config.json."
        )
    unknown = sorted(set(map(str, kinds)) - {*ATTENDING, *WITHOUT_KV})
    if unknown:
        raise ValueError(
            f"{name} has layers of type {', '.join(unknown)}. The planner knows "
            f"{', '.join((*ATTENDING, *WITHOUT_KV))}. Use another model."
        )
    if len(kinds) != num_layers:
        raise ValueError(
            f"{name} has {len(kinds)} layer_types and {num_layers} layers. There must "
            "be one for each layer. Correct the config.json."
        )
    return list(kinds)


def _layer_shape(
    config: Mapping[str, Any], name: str, kind: str, index: int
) -> LayerShape:
    """Layer `index`, whose own values are in `config`."""
    if config.get("model_type") in LATENT:
        heads = config_size(config, name, "num_attention_heads")
        rank = config_size(config, name, "kv_lora_rank")
        return mla_layers(1, heads, rank, config_size(config, name, "qk_rope_head_dim"))
    # MiMo and Inkling size their sliding layers apart.
    prefix = "swa_" if "sliding" in kind and config.get("swa_head_dim") else ""
    heads = config_size(config, name, f"{prefix}num_attention_heads")
    per_layer = config.get("num_attention_heads_per_layer")
    if per_layer:
        heads = per_layer[index]
    if config.get("model_type") in EXPANDED_LATENT:
        nope = config_size(config, name, "qk_nope_head_dim")
        # vLLM pads the values to the size of the keys.
        size = nope + config_size(config, name, "qk_rope_head_dim")
        return gqa_layers(1, heads, heads, size)
    size = config_size(
        config,
        name,
        *(prefix + key for key in HEAD_SIZE),
        default=config["hidden_size"] // heads,
    )
    v_size = config_size(config, name, f"{prefix}v_head_dim", default=size)
    kv_heads = (
        config_size(config, name, "swa_num_key_value_heads")
        if prefix
        else _num_kv_heads(config, name)
    )
    attribute = ATTENDING[kind]
    window = config_size(config, name, attribute) if attribute else None
    if window and config.get("model_type") in OPEN_WINDOW:
        window += 1
    return gqa_layers(1, heads, kv_heads, size, v_size, window)


def _num_kv_heads(config: Mapping[str, Any], name: str) -> int:
    # DBRX and MPT; the attribute that DBRX inherits is always 1.
    if kv_heads := (config.get("attn_config") or {}).get("kv_n_heads"):
        return int(kv_heads)
    is_old = not config.get("new_decoder_architecture")
    if config.get("model_type") == "falcon" and config.get("multi_query") and is_old:
        return 1
    return config_size(config, name, *KV_HEADS, default=config["num_attention_heads"])


def config_size(
    config: Mapping[str, Any], name: str, *keys: str, default: int | None = None
) -> int:
    """First of these values that is set.

    Raises:
        ValueError: None of them is, or it is no positive whole number.
    """
    key = next((key for key in keys if config.get(key)), keys[0])
    value = config.get(key) or default
    if type(value) is not int or value < 1:
        raise ValueError(
            f"The config of {name} has {key}={value!r}. It must be a whole number "
            "above 0. Correct the config.json, or use another model."
        )
    return value
