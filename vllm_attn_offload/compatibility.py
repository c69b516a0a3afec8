# SPDX-License-Identifier: Apache-2.0
"""vLLM features that do not work with attention offloading are refused here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_attn_offload.unsupported import DROP, Unsupported, is_set, not_in
from vllm_attn_offload.unsupported_parallel import UNSUPPORTED_PARALLEL

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
_ATTENTION_OP = "vllm::unified_attention_with_output"
_SINK_MODELS = ("gpt_oss",)
_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
#: Not ``auto``, which takes what the checkpoint asks for.
_OWN_KV_DTYPE = "Pass the model's own: --kv-cache-dtype bfloat16, or float16."


def check_arguments(engine_args: EngineArgs) -> None:
    """Refuse early what vLLM would refuse for another reason, or ignore.

    Raises:
        ValueError: Names every unsupported feature, what is allowed and what to do.
    """
    _refuse(each.problem(engine_args) for each in UNSUPPORTED_PARALLEL)


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse a configuration before any process starts.

    Raises:
        ValueError: Names every unsupported feature, what is allowed and what to do.
    """
    parallel = vllm_config.parallel_config
    problems = [each.problem(vllm_config) for each in UNSUPPORTED_CONFIG]
    _refuse(problems + [each.problem(parallel) for each in UNSUPPORTED_PARALLEL])


def _refuse(problems: Iterable[str]) -> None:
    if text := "\n".join(filter(None, problems)):
        raise ValueError(text)


def check_layers(problems: Iterable[str]) -> None:
    """Refuse a model whose layers cannot be offloaded, after it was loaded.

    Raises:
        ValueError: ``problems`` is not empty.
    """
    listed = list(problems)
    if listed:
        raise ValueError(
            f"Attention offloading does not support {len(listed)} layer(s) of this "
            f"model: {'; '.join(listed[:3])}. Allowed: causal decoder attention over "
            "the full context. Run this model without --attention-offload."
        )


def _sliding_window(config: VllmConfig) -> str:
    window = config.model_config.get_sliding_window()
    return f"a sliding window of {window} tokens" if window else ""


def _soft_cap(config: VllmConfig) -> str:
    # Gemma-2 names it so; models without the field have none.
    cap = config.model_config.hf_text_config.to_dict().get("attn_logit_softcapping")
    return f"attn_logit_softcapping={cap}" if cap else ""


def _sinks(config: VllmConfig) -> str:
    text = config.model_config.hf_text_config
    is_asked = text.model_type in _SINK_MODELS or any(
        value is True
        for name, value in text.to_dict().items()
        if "attention_sink" in name
    )
    return "attention sinks" if is_asked else ""


def _uneven_heads(config: VllmConfig) -> str:
    """Find layers whose heads differ: each kind of them sends a step of its own."""
    text = config.model_config.hf_text_config.to_dict()
    per_layer = text.get("num_key_value_heads_per_layer") or [
        (block.get("attention") or {}).get("n_heads_in_group")
        for block in text.get("block_configs") or ()
    ]
    # Of a layer without attention there are none.
    differ = len(set(per_layer) - {None}) > 1
    return "layers that differ in their heads" if differ else ""


def _shared_kv(config: VllmConfig) -> str:
    # Gemma-3n and Gemma-4 name it so; models without the field have none.
    count = config.model_config.hf_text_config.to_dict().get("num_kv_shared_layers")
    return f"num_kv_shared_layers={count}" if count else ""


def _checkpoint_kv_dtype(config: VllmConfig) -> str:
    """Find what vLLM applies only when it builds the layers."""
    quantisation = getattr(config.model_config.hf_config, "quantization_config", None)
    scheme = (quantisation or {}).get("kv_cache_scheme")
    if not scheme or config.cache_config.cache_dtype != "auto":
        return ""
    return "the KV cache that the checkpoint quantises (kv_cache_scheme)"


def _value_heads(config: VllmConfig) -> str:
    text, keys = config.model_config.hf_text_config, config.model_config.get_head_size()
    size = getattr(text, "v_head_dim", None) or keys
    # Models with MLA pad their values.
    differs = size != keys and not getattr(text, "kv_lora_rank", None)
    return f"values of size {size} with keys of size {keys}" if differs else ""


def _mixed_kv_dtype(config: VllmConfig) -> str:
    dtype = config.cache_config.cache_dtype
    model = str(config.model_config.dtype).removeprefix("torch.")
    differs = dtype in _KV_CACHE_DTYPES[1:] and dtype != model
    return f"kv_cache_dtype={dtype!r} with dtype={model!r}" if differs else ""


def _batch_invariant(_: VllmConfig) -> str:
    from vllm import envs

    return "VLLM_BATCH_INVARIANT=1" if envs.VLLM_BATCH_INVARIANT else ""


def _attention_in_graphs(config: VllmConfig) -> str:
    """Find attention that a CUDA graph would replay: no message can be sent there."""
    from vllm import envs

    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    if mode.mixed_mode().name == "FULL":
        return f"cudagraph_mode={mode.name}"
    # Breakable graphs leave attention out by themselves.
    is_split = _ATTENTION_OP in (compilation.splitting_ops or ())
    is_split = is_split or envs.VLLM_USE_BREAKABLE_CUDAGRAPH
    is_captured = mode.has_piecewise_cudagraphs() and not is_split
    return f"splitting_ops without {_ATTENTION_OP}" if is_captured else ""


UNSUPPORTED_CONFIG = (
    Unsupported(
        "Sliding-window layers",
        _sliding_window,
        "attention over the full context",
        "Pass --disable-sliding-window to limit the context to the window, or run "
        "without --attention-offload.",
    ),
    Unsupported(
        "Chunked local attention",
        is_set(
            "model_config.attention_chunk_size",
            "attention in chunks of {} tokens (attention_chunk_size)",
        ),
        "attention over the full context",
    ),
    Unsupported("Attention sinks", _sinks, "attention without sinks"),
    Unsupported(
        "Layers that differ in their heads", _uneven_heads, "layers that are alike"
    ),
    Unsupported("KV sharing between layers", _shared_kv, "layers with a KV cache each"),
    Unsupported("Logit soft cap", _soft_cap, "no soft cap"),
    Unsupported(
        "ALiBi",
        is_set("model_config.uses_alibi", "ALiBi"),
        "attention without position biases",
    ),
    Unsupported("Value heads of another size", _value_heads, "values as long as keys"),
    Unsupported(
        "MLA",
        is_set("model_config.use_mla", "multi-head latent attention (MLA)"),
        "multi-head, multi-query and grouped-query attention",
        "Run with VLLM_MLA_DISABLE=1 or without --attention-offload.",
    ),
    Unsupported(
        "Hybrid, Mamba and linear-attention models",
        is_set("model_config.is_hybrid", "hybrid models"),
        "models whose layers all attend over a paged KV cache",
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
        is_set("model_config.is_mm_prefix_lm", "prefix-LM attention"),
        "causal attention",
    ),
    Unsupported(
        "Pooling models",
        not_in(("generate",), "model_config.runner_type", "runner={!r}"),
        "runner='generate'",
    ),
    Unsupported(
        "Quantised KV cache",
        not_in(_KV_CACHE_DTYPES, "cache_config.cache_dtype", "kv_cache_dtype={!r}"),
        f"kv_cache_dtype in {', '.join(_KV_CACHE_DTYPES)}",
        _OWN_KV_DTYPE,
    ),
    Unsupported(
        "KV cache quantised by the checkpoint",
        _checkpoint_kv_dtype,
        "a KV cache of the model's dtype",
        _OWN_KV_DTYPE,
    ),
    Unsupported(
        "KV cache dtype other than the model's",
        _mixed_kv_dtype,
        "the dtype of the model",
        "Pass --kv-cache-dtype auto.",
    ),
    Unsupported(
        "Model dtypes",
        not_in(_DTYPES, "model_config.dtype", "dtype={}"),
        ", ".join(_DTYPES),
        "Pass --dtype bfloat16 or float32.",
    ),
    Unsupported(
        "Speculative decoding",
        is_set("speculative_config", "speculative decoding ({.method})"),
        "plain decoding",
        DROP,
    ),
    Unsupported(
        "KV connectors, disaggregated prefill",
        is_set("kv_transfer_config", "a KV connector (kv_transfer_config)"),
        "no KV connector: the KV cache is not on the compute node",
        DROP,
    ),
    Unsupported(
        "KV offloading to host memory",
        is_set("cache_config.kv_offloading_size", "kv_offloading_size={}"),
        "kv_offloading_size unset: memory nodes hold the KV cache",
        "Drop --kv-offloading-size and size the pool with kv_cache_gib.",
    ),
    Unsupported(
        "HiSparse", is_set("attention_config.hisparse_config"), "dense attention", DROP
    ),
    Unsupported(
        "Attention backend per layer kind",
        is_set("attention_config.backend_per_kind"),
        "one backend, chosen by attention offloading",
        DROP,
    ),
    Unsupported(
        "Fused attention output quantisation",
        is_set(
            "compilation_config.pass_config.fuse_attn_quant",
            "the compilation pass fuse_attn_quant",
        ),
        "unquantised attention output; every other pass of vLLM",
        "Drop fuse_attn_quant from --compilation-config.",
    ),
    Unsupported(
        "Attention inside CUDA graphs",
        _attention_in_graphs,
        "cudagraph_mode=PIECEWISE or NONE with vLLM's own splitting_ops",
        "Drop the option from --compilation-config.",
    ),
    Unsupported(
        "KV-sharing fast prefill",
        is_set("cache_config.kv_sharing_fast_prefill"),
        "kv_sharing_fast_prefill unset",
        DROP,
    ),
    Unsupported(
        "Batch invariance",
        _batch_invariant,
        "VLLM_BATCH_INVARIANT=0",
        "Unset VLLM_BATCH_INVARIANT.",
    ),
)

UNSUPPORTED = (*UNSUPPORTED_CONFIG, *UNSUPPORTED_PARALLEL)
