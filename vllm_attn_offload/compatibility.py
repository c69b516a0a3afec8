# SPDX-License-Identifier: Apache-2.0
"""vLLM features that do not work with attention offloading are refused here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_attn_offload.unsupported import DROP, Unsupported, is_set, not_in
from vllm_attn_offload.unsupported_kv_dtype import UNSUPPORTED_KV_DTYPE
from vllm_attn_offload.unsupported_models import UNSUPPORTED_MODELS
from vllm_attn_offload.unsupported_parallel import UNSUPPORTED_PARALLEL
from vllm_attn_offload.unsupported_speculative import UNSUPPORTED_SPECULATIVE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_ATTENTION_OP = "vllm::unified_attention_with_output"
_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")


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
            f"model: {'; '.join(listed[:3])}. Allowed: causal decoder attention by "
            "vLLM's own layer, with values as long as keys. Run this model without "
            "--attention-offload."
        )


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
    *UNSUPPORTED_MODELS,
    *UNSUPPORTED_KV_DTYPE,
    *UNSUPPORTED_SPECULATIVE,
    Unsupported(
        "Pooling models",
        not_in(("generate",), "model_config.runner_type", "runner={!r}"),
        "runner='generate'",
    ),
    Unsupported(
        "Model dtypes",
        not_in(_DTYPES, "model_config.dtype", "dtype={}"),
        ", ".join(_DTYPES),
        "Pass --dtype bfloat16 or float32.",
    ),
    Unsupported(
        "KV connectors, disaggregated prefill",
        is_set("kv_transfer_config", "a KV connector (kv_transfer_config)"),
        "no KV connector: the KV cache is not on the compute node",
        DROP,
    ),
    Unsupported(
        "Encoder-cache connectors",
        is_set("ec_transfer_config", "an encoder-cache connector (ec_transfer_config)"),
        "no encoder-cache connector: it cannot read a step that lost a memory node",
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
