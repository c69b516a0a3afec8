# SPDX-License-Identifier: Apache-2.0
"""A model's next tokens by transformers, with keys and values as fp8 has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

E4M3_MAX = 448.0
#: Of k and v, by layer; set while a model runs.
_scales: list[tuple[float, float]] = []


def _attend_to_fp8(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    scales = _scales[module.layer_idx]
    rounded = map(_round_to_fp8, (key, value), scales)
    return sdpa_attention_forward(module, query, *rounded, *args, **kwargs)


def _round_to_fp8(rows: torch.Tensor, scale: float) -> torch.Tensor:
    numbers = (rows.float() / torch.tensor(scale)).clamp(-E4M3_MAX, E4M3_MAX)
    return (numbers.to(torch.float8_e4m3fn).float() * scale).to(rows.dtype)


AttentionInterface.register("fp8_kv", _attend_to_fp8)


def reference_distribution(
    model: Path,
    prompt: list[int],
    dtype: torch.dtype,
    scales: list[tuple[float, float]] | None,
) -> torch.Tensor:
    """Log-probabilities of every token after each but the last of the prompt.

    Args:
        model: Checkpoint without scales.
        prompt: Token ids.
        dtype: Of weights and activations.
        scales: Of each layer's k and v in fp8; None: these are not rounded.

    Returns:
        float64 ``[len(prompt) - 1, vocabulary]``.
    """
    _scales[:] = scales or []
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, attn_implementation="fp8_kv" if scales else "sdpa"
    )
    with torch.inference_mode():
        logits = loaded(torch.tensor([prompt])).logits[0, :-1]
    return logits.double().log_softmax(-1)
