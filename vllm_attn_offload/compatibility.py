# SPDX-License-Identifier: Apache-2.0
"""Which vLLM features work with attention offloading; everything else is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
_ATTENTION_OP = "vllm::unified_attention_with_output"
_SettingsT = TypeVar("_SettingsT")
_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")


@dataclass(frozen=True, slots=True)
class Refusal(Generic[_SettingsT]):
    """A feature that this release does not support.

    Args:
        feature: Name in the README's table.
        given: What the settings ask for, or "" where they do not.
        allowed: What works instead.
        advice: What to do.
    """

    feature: str
    given: Callable[[_SettingsT], str]
    allowed: str
    advice: str

    def message(self, given: str) -> str:
        """The three parts of the error."""
        return (
            f"Attention offloading does not support {given}. Allowed: {self.allowed}. "
            f"{self.advice}"
        )


def check_arguments(engine_args: EngineArgs) -> None:
    """Refuse what vLLM would refuse for another reason, or ignore.

    Raises:
        ValueError: As ``check_supported``.
    """
    _refuse(_problems(PARALLEL_REFUSALS, engine_args))


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse a configuration before any process starts.

    Raises:
        ValueError: Names every feature that is not supported, what is, and what to do.
    """
    _refuse(
        _problems(CONFIG_REFUSALS, vllm_config)
        + _problems(PARALLEL_REFUSALS, vllm_config.parallel_config)
    )


def _problems(
    refusals: Iterable[Refusal[_SettingsT]], settings: _SettingsT
) -> list[str]:
    return [
        refusal.message(given)
        for refusal in refusals
        if (given := refusal.given(settings))
    ]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def check_recovery(recovery_timeout_s: float) -> None:
    """Compare deadlines: a recovery must end before vLLM gives the step up.

    Raises:
        ValueError: It would not.
    """
    from vllm import envs

    allowed = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
    if recovery_timeout_s >= allowed:
        raise ValueError(
            f"recovery_timeout_s={recovery_timeout_s:g} was given. Allowed: less than "
            f"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS={allowed}. Lower the one or raise the "
            "other."
        )


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


def _flag(value: object, text: str) -> str:
    return text if value else ""


def _above_one(value: int, name: str) -> str:
    return f"{name}={value}" if value > 1 else ""


def _soft_cap(config: VllmConfig) -> str:
    # Gemma-2 names it so; models without the field have none.
    cap = config.model_config.hf_text_config.to_dict().get("attn_logit_softcapping")
    return _flag(cap, f"attn_logit_softcapping={cap}")


def _kv_cache_dtype(config: VllmConfig) -> str:
    dtype = config.cache_config.cache_dtype
    return _flag(dtype not in _KV_CACHE_DTYPES, f"kv_cache_dtype={dtype!r}")


def _mixed_kv_dtype(config: VllmConfig) -> str:
    dtype = config.cache_config.cache_dtype
    model = str(config.model_config.dtype).removeprefix("torch.")
    differs = dtype in _KV_CACHE_DTYPES[1:] and dtype != model
    return _flag(differs, f"kv_cache_dtype={dtype!r} with dtype={model!r}")


def _dtype(config: VllmConfig) -> str:
    dtype = str(config.model_config.dtype)
    return _flag(dtype not in _DTYPES, f"dtype={dtype}")


def _speculative(config: VllmConfig) -> str:
    if config.speculative_config is None:
        return ""
    return f"speculative decoding ({config.speculative_config.method})"


def _batch_invariant(_: VllmConfig) -> str:
    from vllm import envs

    return _flag(envs.VLLM_BATCH_INVARIANT, "VLLM_BATCH_INVARIANT=1")


def _runner(config: VllmConfig) -> str:
    runner = config.model_config.runner_type
    return _flag(runner != "generate", f"runner={runner!r}")


def _attention_in_graphs(config: VllmConfig) -> str:
    """What would replay attention from a CUDA graph, where no message can be sent."""
    from vllm import envs

    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    if mode.mixed_mode().name == "FULL":
        return f"cudagraph_mode={mode.name}"
    # Breakable graphs leave attention out by themselves.
    is_split = _ATTENTION_OP in (compilation.splitting_ops or ())
    is_split = is_split or envs.VLLM_USE_BREAKABLE_CUDAGRAPH
    is_captured = mode.has_piecewise_cudagraphs() and not is_split
    return _flag(is_captured, f"splitting_ops without {_ATTENTION_OP}")


_NO_OFFLOAD = "Run this model without --attention-offload."
_DROP = "Drop the option, or run without --attention-offload."

# EngineArgs and ParallelConfig share these names. Both are checked: vLLM blames the
# executor for some of them before a config exists, and drops some on CPU.
PARALLEL_REFUSALS: tuple[Refusal[EngineArgs | ParallelConfig], ...] = (
    Refusal(
        "Pipeline parallelism",
        lambda p: _above_one(p.pipeline_parallel_size, "pipeline_parallel_size"),
        "pipeline_parallel_size=1",
        "Use tensor parallelism.",
    ),
    Refusal(
        "Context parallelism",
        lambda p: (
            _above_one(
                p.decode_context_parallel_size,
                "decode_context_parallel_size",
            )
            or _above_one(
                p.prefill_context_parallel_size,
                "prefill_context_parallel_size",
            )
        ),
        "decode_context_parallel_size=1 and prefill_context_parallel_size=1",
        "Drop both; memory nodes already spread the context.",
    ),
    Refusal(
        "Engines over several hosts",
        lambda p: _above_one(p.nnodes, "nnodes"),
        "nnodes=1",
        _DROP,
    ),
    Refusal(
        "Dual-batch overlap",
        lambda p: _flag(p.enable_dbo, "enable_dbo"),
        "enable_dbo unset",
        _DROP,
    ),
    Refusal(
        "Elastic expert parallelism",
        lambda p: _flag(p.enable_elastic_ep, "enable_elastic_ep"),
        "enable_elastic_ep unset",
        _DROP,
    ),
)

CONFIG_REFUSALS: tuple[Refusal[VllmConfig], ...] = (
    Refusal(
        "Sliding-window layers",
        lambda c: _flag(
            c.model_config.get_sliding_window(),
            f"a sliding window of {c.model_config.get_sliding_window()} tokens",
        ),
        "attention over the full context",
        "Pass --disable-sliding-window to limit the context to the window, or run "
        "without --attention-offload.",
    ),
    Refusal("Logit soft cap", _soft_cap, "no soft cap", _NO_OFFLOAD),
    Refusal(
        "ALiBi",
        lambda c: _flag(c.model_config.uses_alibi, "ALiBi"),
        "attention without position biases",
        _NO_OFFLOAD,
    ),
    Refusal(
        "MLA",
        lambda c: _flag(c.model_config.use_mla, "multi-head latent attention (MLA)"),
        "multi-head, multi-query and grouped-query attention",
        "Run with VLLM_MLA_DISABLE=1 or without --attention-offload.",
    ),
    Refusal(
        "Hybrid, Mamba and linear-attention models",
        lambda c: _flag(c.model_config.is_hybrid, "hybrid models"),
        "models whose layers all attend over a paged KV cache",
        _NO_OFFLOAD,
    ),
    Refusal(
        "Attention-free models",
        lambda c: _flag(c.model_config.is_attention_free, "attention-free models"),
        "models with attention",
        _NO_OFFLOAD,
    ),
    Refusal(
        "Encoder-decoder models",
        lambda c: _flag(c.model_config.is_encoder_decoder, "encoder-decoder models"),
        "decoder-only models",
        _NO_OFFLOAD,
    ),
    Refusal(
        "Prefix-LM attention",
        lambda c: _flag(c.model_config.is_mm_prefix_lm, "prefix-LM attention"),
        "causal attention",
        _NO_OFFLOAD,
    ),
    Refusal("Pooling models", _runner, "runner='generate'", _NO_OFFLOAD),
    Refusal(
        "Quantised KV cache",
        _kv_cache_dtype,
        f"kv_cache_dtype in {', '.join(_KV_CACHE_DTYPES)}",
        "Pass --kv-cache-dtype auto.",
    ),
    Refusal(
        "KV cache dtype other than the model's",
        _mixed_kv_dtype,
        "the dtype of the model",
        "Pass --kv-cache-dtype auto.",
    ),
    Refusal(
        "Model dtypes", _dtype, ", ".join(_DTYPES), "Pass --dtype bfloat16 or float32."
    ),
    Refusal("Speculative decoding", _speculative, "plain decoding", _DROP),
    Refusal(
        "KV connectors, disaggregated prefill",
        lambda c: _flag(c.kv_transfer_config, "a KV connector (kv_transfer_config)"),
        "no KV connector: the KV cache is not on the compute node",
        _DROP,
    ),
    Refusal(
        "KV offloading to host memory",
        lambda c: _flag(
            c.cache_config.kv_offloading_size,
            f"kv_offloading_size={c.cache_config.kv_offloading_size}",
        ),
        "kv_offloading_size unset: memory nodes hold the KV cache",
        "Drop --kv-offloading-size and size the pool with kv_cache_gib.",
    ),
    Refusal(
        "HiSparse",
        lambda c: _flag(c.attention_config.hisparse_config, "hisparse_config"),
        "dense attention",
        _DROP,
    ),
    Refusal(
        "Attention backend per layer kind",
        lambda c: _flag(c.attention_config.backend_per_kind, "backend_per_kind"),
        "one backend, chosen by attention offloading",
        _DROP,
    ),
    Refusal(
        "Fused attention output quantisation",
        lambda c: _flag(
            c.compilation_config.pass_config.fuse_attn_quant,
            "the compilation pass fuse_attn_quant",
        ),
        "unquantised attention output; every other pass of vLLM",
        "Drop fuse_attn_quant from --compilation-config.",
    ),
    Refusal(
        "Attention inside CUDA graphs",
        _attention_in_graphs,
        "cudagraph_mode=PIECEWISE or NONE with vLLM's own splitting_ops",
        "Drop the option from --compilation-config.",
    ),
    Refusal(
        "KV-sharing fast prefill",
        lambda c: _flag(
            c.cache_config.kv_sharing_fast_prefill, "kv_sharing_fast_prefill"
        ),
        "kv_sharing_fast_prefill unset",
        _DROP,
    ),
    Refusal(
        "Batch invariance",
        _batch_invariant,
        "VLLM_BATCH_INVARIANT=0",
        "Unset VLLM_BATCH_INVARIANT.",
    ),
)

REFUSALS: tuple[Refusal[Any], ...] = (*CONFIG_REFUSALS, *PARALLEL_REFUSALS)
