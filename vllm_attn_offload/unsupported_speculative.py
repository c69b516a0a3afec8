# SPDX-License-Identifier: Apache-2.0
"""Ways of speculative decoding that are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_attn_offload.client.step_partition import MAX_DECODE_ROWS
from vllm_attn_offload.unsupported import DROP, Unsupported

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig

#: vLLM renames the methods of single models, such as deepseek_mtp, to mtp.
_METHODS = ("ngram", "suffix", "eagle", "eagle3", "draft_model", "mtp")
_MAX_TOKENS = MAX_DECODE_ROWS - 1


def _method(config: VllmConfig) -> str:
    speculation = config.speculative_config
    if speculation is None:
        return ""
    name = speculation.method
    if name == "mtp" and speculation.use_gemma4_mtp():
        # Its layers read the KV of another model's.
        name = "gemma4_mtp"
    return "" if name in _METHODS else f"speculative decoding by {name}"


def _num_tokens(config: VllmConfig) -> str:
    speculation = config.speculative_config
    count = 0 if speculation is None else speculation.num_speculative_tokens
    return f"num_speculative_tokens={count}" if count > _MAX_TOKENS else ""


def _parallel(config: VllmConfig) -> str:
    speculation = config.speculative_config
    is_on = speculation is not None and speculation.parallel_drafting
    # Of methods that are refused, vLLM sets it itself.
    return "parallel_drafting" if is_on and not _method(config) else ""


def _hybrid(config: VllmConfig) -> str:
    if config.speculative_config is None:
        return ""
    draft = _draft_model(config.speculative_config)
    is_hybrid = config.model_config.is_hybrid or (draft and draft.is_hybrid)
    return "speculative decoding with recurrent states" if is_hybrid else ""


def _draft_attention(config: VllmConfig) -> str:
    """Find what layers of a draft model do not share with the target's."""
    speculation = config.speculative_config
    if speculation is None:
        return ""
    names = ("attention_backend", "kv_cache_dtype")
    given = [f"{n}={v}" for n in names if (v := getattr(speculation, n)) is not None]
    draft = _draft_model(speculation)
    if draft and draft.use_mla and not config.model_config.use_mla:
        given.append("multi-head latent attention (MLA)")
    return f"{' and '.join(given)} in a draft model" if given else ""


def _adaptive(config: VllmConfig) -> str:
    speculation = config.speculative_config
    is_on = speculation is not None and speculation.enable_adaptive_verification
    return "enable_adaptive_verification" if is_on else ""


def _draft_model(speculation: SpeculativeConfig) -> ModelConfig | None:
    """The drafter's own model; ngrams and suffixes name the target or nothing."""
    return speculation.draft_model_config if speculation.uses_draft_kv_cache() else None


UNSUPPORTED_SPECULATIVE = (
    Unsupported(
        "Speculative decoding by other methods",
        _method,
        f"the methods {', '.join(_METHODS)}",
        "Choose one of them in --speculative-config, or drop it.",
    ),
    Unsupported(
        "More than 15 speculative tokens",
        _num_tokens,
        f"num_speculative_tokens up to {_MAX_TOKENS}",
        "Set it in --speculative-config; without it, suffix decoding takes more.",
    ),
    Unsupported(
        "Parallel drafting",
        _parallel,
        "drafts made one after another",
        "Drop parallel_drafting from --speculative-config, and choose another draft "
        "model.",
    ),
    Unsupported(
        "Speculative decoding of hybrid models",
        _hybrid,
        "speculative decoding of models whose layers all attend",
        "Drop --speculative-config, or run without --attention-offload.",
    ),
    Unsupported(
        "Attention of a draft model's own",
        _draft_attention,
        "draft models that attend as the target model does",
        "Drop the option from --speculative-config, or choose another draft model.",
    ),
    Unsupported(
        "Adaptive verification of drafts",
        _adaptive,
        "enable_adaptive_verification unset",
        DROP,
    ),
)
