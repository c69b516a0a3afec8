# SPDX-License-Identifier: Apache-2.0
"""``vllm.LLM`` with two more arguments."""

from __future__ import annotations

from typing import Any

import vllm

from vllm_attn_offload.engine.args import environment_of_one_engine
from vllm_attn_offload.patches import apply_patches
from vllm_attn_offload.patches.engine_args import with_options


class LLM(vllm.LLM):
    """``vllm.LLM`` that can keep its KV cache on memory nodes.

    Args:
        model: Passed on to ``vllm.LLM``.
        attention_offload: Offload attention; False changes nothing.
        attention_offload_config: Options of ``--attention-offload-config``; they imply
            ``attention_offload``.
        **kwargs: Passed on to ``vllm.LLM``.

    Raises:
        ValueError: An unknown option, or a feature that offloading does not support.
        PatchError: The installed vLLM is not one of the tested versions.
    """

    def __init__(
        self,
        model: str,
        *,
        attention_offload: bool = False,
        attention_offload_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if attention_offload or attention_offload_config is not None:
            # Also without the entry point, for example under VLLM_PLUGINS="".
            apply_patches()
            kwargs["additional_config"] = with_options(
                kwargs.get("additional_config") or {}, attention_offload_config or {}
            )
        with environment_of_one_engine():
            super().__init__(model, **kwargs)
