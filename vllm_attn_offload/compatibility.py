# SPDX-License-Identifier: Apache-2.0
"""vLLM features that do not work with attention offloading are refused here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
_ATTENTION_OP = "vllm::unified_attention_with_output"
_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
_DROP = "Drop the option, or run without --attention-offload."
_Given = Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A feature that this release does not support.

    Args:
        feature: Name in the README.
        given: Describes what the settings ask for, or returns "" where they do not.
        allowed: Settings that work instead.
        advice: Instruction to the user.
    """

    feature: str
    given: _Given
    allowed: str
    advice: str = "Run this model without --attention-offload."

    def problem(self, settings: object) -> str:
        """Return the three parts of the error, or "" where nothing is wrong."""
        given = self.given(settings)
        return given and (
            f"Attention offloading does not support {given}. Allowed: {self.allowed}. "
            f"{self.advice}"
        )


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


def _set(path: str, text: str = "") -> _Given:
    """Match an attribute that is set; ``text`` may hold {} for its value."""
    get, text = attrgetter(path), text or path.split(".")[-1]
    return lambda settings: text.format(value) if (value := get(settings)) else ""


def _not_in(allowed: tuple[str, ...], path: str, text: str) -> _Given:
    """Match an attribute with a value other than these."""
    get = attrgetter(path)
    return lambda settings: (
        "" if str(get(settings)) in allowed else text.format(get(settings))
    )


def _above_one(*names: str) -> _Given:
    """Match the first of these attributes that is above 1."""
    return lambda settings: next(
        (f"{n}={getattr(settings, n)}" for n in names if getattr(settings, n) > 1), ""
    )


def _sliding_window(config: VllmConfig) -> str:
    window = config.model_config.get_sliding_window()
    return f"a sliding window of {window} tokens" if window else ""


def _soft_cap(config: VllmConfig) -> str:
    # Gemma-2 names it so; models without the field have none.
    cap = config.model_config.hf_text_config.to_dict().get("attn_logit_softcapping")
    return f"attn_logit_softcapping={cap}" if cap else ""


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


# EngineArgs and ParallelConfig share these names. Both are checked: vLLM blames the
# executor for some of them before a config exists, and drops some on CPU.
UNSUPPORTED_PARALLEL = (
    Unsupported(
        "Pipeline parallelism",
        _above_one("pipeline_parallel_size"),
        "pipeline_parallel_size=1",
        "Use tensor parallelism.",
    ),
    Unsupported(
        "Context parallelism",
        _above_one("decode_context_parallel_size", "prefill_context_parallel_size"),
        "decode_context_parallel_size=1 and prefill_context_parallel_size=1",
        "Drop both; memory nodes already spread the context.",
    ),
    Unsupported("Engines over several hosts", _above_one("nnodes"), "nnodes=1", _DROP),
    Unsupported("Dual-batch overlap", _set("enable_dbo"), "enable_dbo unset", _DROP),
    Unsupported(
        "Elastic expert parallelism",
        _set("enable_elastic_ep"),
        "enable_elastic_ep unset",
        _DROP,
    ),
)

UNSUPPORTED_CONFIG = (
    Unsupported(
        "Sliding-window layers",
        _sliding_window,
        "attention over the full context",
        "Pass --disable-sliding-window to limit the context to the window, or run "
        "without --attention-offload.",
    ),
    Unsupported("Logit soft cap", _soft_cap, "no soft cap"),
    Unsupported(
        "ALiBi",
        _set("model_config.uses_alibi", "ALiBi"),
        "attention without position biases",
    ),
    Unsupported("Value heads of another size", _value_heads, "values as long as keys"),
    Unsupported(
        "MLA",
        _set("model_config.use_mla", "multi-head latent attention (MLA)"),
        "multi-head, multi-query and grouped-query attention",
        "Run with VLLM_MLA_DISABLE=1 or without --attention-offload.",
    ),
    Unsupported(
        "Hybrid, Mamba and linear-attention models",
        _set("model_config.is_hybrid", "hybrid models"),
        "models whose layers all attend over a paged KV cache",
    ),
    Unsupported(
        "Attention-free models",
        _set("model_config.is_attention_free", "attention-free models"),
        "models with attention",
    ),
    Unsupported(
        "Encoder-decoder models",
        _set("model_config.is_encoder_decoder", "encoder-decoder models"),
        "decoder-only models",
    ),
    Unsupported(
        "Prefix-LM attention",
        _set("model_config.is_mm_prefix_lm", "prefix-LM attention"),
        "causal attention",
    ),
    Unsupported(
        "Pooling models",
        _not_in(("generate",), "model_config.runner_type", "runner={!r}"),
        "runner='generate'",
    ),
    Unsupported(
        "Quantised KV cache",
        _not_in(_KV_CACHE_DTYPES, "cache_config.cache_dtype", "kv_cache_dtype={!r}"),
        f"kv_cache_dtype in {', '.join(_KV_CACHE_DTYPES)}",
        "Pass --kv-cache-dtype auto.",
    ),
    Unsupported(
        "KV cache dtype other than the model's",
        _mixed_kv_dtype,
        "the dtype of the model",
        "Pass --kv-cache-dtype auto.",
    ),
    Unsupported(
        "Model dtypes",
        _not_in(_DTYPES, "model_config.dtype", "dtype={}"),
        ", ".join(_DTYPES),
        "Pass --dtype bfloat16 or float32.",
    ),
    Unsupported(
        "Speculative decoding",
        _set("speculative_config", "speculative decoding ({.method})"),
        "plain decoding",
        _DROP,
    ),
    Unsupported(
        "KV connectors, disaggregated prefill",
        _set("kv_transfer_config", "a KV connector (kv_transfer_config)"),
        "no KV connector: the KV cache is not on the compute node",
        _DROP,
    ),
    Unsupported(
        "KV offloading to host memory",
        _set("cache_config.kv_offloading_size", "kv_offloading_size={}"),
        "kv_offloading_size unset: memory nodes hold the KV cache",
        "Drop --kv-offloading-size and size the pool with kv_cache_gib.",
    ),
    Unsupported(
        "HiSparse", _set("attention_config.hisparse_config"), "dense attention", _DROP
    ),
    Unsupported(
        "Attention backend per layer kind",
        _set("attention_config.backend_per_kind"),
        "one backend, chosen by attention offloading",
        _DROP,
    ),
    Unsupported(
        "Fused attention output quantisation",
        _set(
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
        _set("cache_config.kv_sharing_fast_prefill"),
        "kv_sharing_fast_prefill unset",
        _DROP,
    ),
    Unsupported(
        "Batch invariance",
        _batch_invariant,
        "VLLM_BATCH_INVARIANT=0",
        "Unset VLLM_BATCH_INVARIANT.",
    ),
)

UNSUPPORTED = (*UNSUPPORTED_CONFIG, *UNSUPPORTED_PARALLEL)
