# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of the rows of a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.punica_wrapper import PunicaWrapperBase

_State = dict[str, Any]


class LoraRows:
    """Cuts the mapping from rows to adapters that vLLM sets once for a whole step.

    All LoRA layers read it from one object (`vllm/lora/punica_wrapper/punica_cpu.py`),
    whose state is replaced while a micro-batch computes. vLLM writes it again only when
    the mapping changes, so the state of the step must come back.

    Args:
        model: With LoRA layers, or without.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._wrappers = list(
            {
                id(module.punica_wrapper): module.punica_wrapper
                for module in model.modules()
                if isinstance(module, BaseLayerWithLoRA)
            }.values()
        )

    def whole(self) -> list[_State]:
        """The state of the step."""
        return [dict(vars(wrapper)) for wrapper in self._wrappers]

    def of(self, rows: slice) -> list[_State]:
        """The state of a micro-batch, while that of the step is in force."""
        return [
            dict(vars(wrapper))
            # Without adapters nothing reads the rest; an encoder may have no rows.
            if wrapper.no_lora or wrapper.indices_len[0] is None
            else vars(_cut(wrapper, rows))
            for wrapper in self._wrappers
        ]

    def use(self, states: list[_State]) -> None:
        """Put states in force, until others are."""
        for wrapper, state in zip(self._wrappers, states, strict=True):
            vars(wrapper).update(state)


def _cut(wrapper: PunicaWrapperBase, rows: slice) -> PunicaWrapperBase:
    indices = wrapper.token_lora_indices[rows]
    num_rows = indices.shape[0]
    part = type(wrapper)(num_rows, num_rows, wrapper.device)
    part._token_lora_indices.copy_(indices)
    part._embeddings_indices.copy_(wrapper._embeddings_indices[rows])
    part.indices_len[0] = part.indices_len[3] = num_rows
    part.is_prefill = wrapper.is_prefill
    part._update_prefill_metadata(indices)
    return part
