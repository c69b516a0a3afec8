# SPDX-License-Identifier: Apache-2.0
"""Types of a KV cache that are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vllm_attn_offload.unsupported import Unsupported, is_set, not_in

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_OWN_DTYPES = ("auto", "float16", "bfloat16")
_FP8_DTYPES = ("fp8", "fp8_e4m3")
#: Not ``auto``, which takes what the checkpoint asks for.
_OWN = "the model's own: --kv-cache-dtype bfloat16, or float16"


def _quantisation(hf_config: Any) -> dict[str, Any]:
    """Of the places where vLLM looks, what the first has."""
    text_config = getattr(hf_config, "text_config", None)
    for place, name in (
        (hf_config, "quantization_config"),
        (text_config, "quantization_config"),
        (hf_config, "compression_config"),
    ):
        found = getattr(place, name, None)
        if found is not None:
            return cast(dict[str, Any], found)
    return {}


def _checkpoint_scheme(config: VllmConfig) -> str:
    """Find what vLLM applies only when it builds the layers."""
    scheme = _quantisation(config.model_config.hf_config).get("kv_cache_scheme")
    is_used = config.cache_config.cache_dtype in ("auto", *_FP8_DTYPES)
    if not is_used or not isinstance(scheme, dict):
        return ""
    kind = (scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy"))
    if kind[:2] == (8, "float") and kind[2] in (None, "tensor"):
        return ""
    return "the checkpoint's KV cache of {} bits of type {} by {}".format(*kind)


def _mixed_dtype(config: VllmConfig) -> str:
    dtype = config.cache_config.cache_dtype
    model = str(config.model_config.dtype).removeprefix("torch.")
    differs = dtype in _OWN_DTYPES[1:] and dtype != model
    return f"kv_cache_dtype={dtype!r} with dtype={model!r}" if differs else ""


UNSUPPORTED_KV_DTYPE = (
    Unsupported(
        "KV cache quantised to other types than fp8 (e4m3)",
        not_in(
            (*_OWN_DTYPES, *_FP8_DTYPES),
            "cache_config.cache_dtype",
            "kv_cache_dtype={!r}",
        ),
        f"kv_cache_dtype in {', '.join((*_OWN_DTYPES, *_FP8_DTYPES))}",
        f"Pass --kv-cache-dtype fp8, or {_OWN}.",
    ),
    Unsupported(
        "KV cache quantised by the checkpoint otherwise than with a scale per layer",
        _checkpoint_scheme,
        "kv_cache_scheme of 8 bits of type float with strategy tensor",
        f"Pass {_OWN}.",
    ),
    Unsupported(
        "Layers left out of a quantised KV cache",
        is_set(
            "cache_config.kv_cache_dtype_skip_layers", "kv_cache_dtype_skip_layers={}"
        ),
        "one KV cache dtype for all layers",
        f"Drop --kv-cache-dtype-skip-layers, or pass {_OWN}.",
    ),
    Unsupported(
        "KV cache dtype other than the model's",
        _mixed_dtype,
        "the dtype of the model, and fp8",
        "Leave --kv-cache-dtype out, or pass the model's dtype or fp8.",
    ),
)
