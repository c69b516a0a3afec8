# SPDX-License-Identifier: Apache-2.0
"""Models that are refused, by what their configuration shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.unsupported import DROP, Unsupported, is_set

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Models here bring attention classes of their own, most of them for GPUs only.
_OWN_ATTENTION = "vllm.models."
#: Of the memory nodes' compiled kernels.
_MAX_HEAD_SIZE = 576


def _own_attention(config: VllmConfig) -> str:
    """Find models of vLLM whose attention is no layer of vLLM's own."""
    from vllm.model_executor.models.registry import ModelRegistry

    name = config.model_config.architecture
    model = ModelRegistry.models.get(name)
    # Of classes that are not imported yet, and of others.
    module = str(
        getattr(model, "module_name", None)
        or getattr(getattr(model, "model_cls", None), "__module__", "")
    )
    # DeepSeek's indexer, with which vLLM attends sparsely wherever it runs.
    is_sparse = getattr(config.model_config.hf_text_config, "index_topk", None)
    is_own = module.startswith(_OWN_ATTENTION) or is_sparse
    return f"the attention of {name}" if is_own else ""


def _mla(config: VllmConfig) -> str:
    is_mla = config.model_config.use_mla and not _own_attention(config)
    return "multi-head latent attention (MLA)" if is_mla else ""


def _head_size(config: VllmConfig) -> str:
    size = config.model_config.get_head_size()
    # Of models without attention it is 0.
    is_held = size % 8 == 0 and size <= _MAX_HEAD_SIZE
    return "" if is_held or config.model_config.use_mla else f"heads of size {size}"


def _value_heads(config: VllmConfig) -> str:
    text, keys = config.model_config.hf_text_config, config.model_config.get_head_size()
    size = getattr(text, "v_head_dim", None) or keys
    # Models with MLA pad their values.
    differs = size != keys and not getattr(text, "kv_lora_rank", None)
    return f"values of size {size} with keys of size {keys}" if differs else ""


def _two_micro_batches(config: VllmConfig) -> str:
    options = AttentionOffloadConfig.of_engine(config)
    is_cut = config.model_config.is_hybrid and options.num_microbatches == 2
    return "num_microbatches=2 for a hybrid model" if is_cut else ""


def _parts_of_blocks(config: VllmConfig) -> str:
    unit = config.cache_config.prefix_match_unit
    is_given = config.model_config.is_hybrid and unit is not None
    return f"prefix_match_unit={unit} for a hybrid model" if is_given else ""


UNSUPPORTED_MODELS = (
    Unsupported("Value heads of another size", _value_heads, "values as long as keys"),
    Unsupported(
        "Head sizes",
        _head_size,
        f"head sizes that are multiples of 8 up to {_MAX_HEAD_SIZE}",
    ),
    Unsupported(
        "Attention classes of a model's own",
        _own_attention,
        "models that attend with vLLM's own attention layer",
    ),
    Unsupported(
        "MLA",
        _mla,
        "multi-head, multi-query and grouped-query attention",
        "Run with VLLM_MLA_DISABLE=1 or without --attention-offload.",
    ),
    Unsupported(
        "Two micro-batches of hybrid models",
        _two_micro_batches,
        "1 or auto, with which its steps run whole",
        "Drop num_microbatches.",
    ),
    Unsupported(
        "Prefix matches within blocks of hybrid models",
        _parts_of_blocks,
        "prefixes of whole blocks, which need no option",
        DROP,
    ),
    Unsupported(
        "Attention-free models",
        is_set("model_config.is_attention_free", "attention-free models"),
        "models with attention",
    ),
    Unsupported(
        "Encoder-decoder models",
        is_set("model_config.is_encoder_decoder", "encoder-decoder models"),
        "decoder-only models",
    ),
    Unsupported(
        "Prefix-LM attention",
        is_set("model_config.is_mm_prefix_lm", "prefix-LM attention to images"),
        "causal attention",
        "Pass --language-model-only to serve text, or run without --attention-offload.",
    ),
)
