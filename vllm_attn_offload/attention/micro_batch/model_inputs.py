# SPDX-License-Identifier: Apache-2.0
"""Inputs and outputs of a model's ``forward``, cut by rows and joined again."""

from __future__ import annotations

from typing import Any

import torch

Inputs = dict[str, Any]

#: Inputs of a model that have a row per token, in their last dimension or the first.
_ROWS_LAST = frozenset({"positions"})
_ROWS_FIRST = frozenset({"input_ids", "inputs_embeds"})


def can_be_cut(inputs: Inputs) -> bool:
    """True if every input has a row per token, where it is known to have them."""
    return all(
        value is None or name in _ROWS_LAST | _ROWS_FIRST
        for name, value in inputs.items()
    )


def num_rows_of(inputs: Inputs) -> int:
    """Rows of a batch that may be padded to a captured graph's size."""
    return next(
        value.shape[-1 if name in _ROWS_LAST else 0]
        for name, value in inputs.items()
        if value is not None
    )


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    """Inputs of some rows of a batch."""
    return {
        name: None
        if value is None
        else value[..., rows]
        if name in _ROWS_LAST
        else value[rows]
        for name, value in inputs.items()
    }


def joined(outputs: list[Any], num_padding: int) -> Any:
    """Rows of both micro-batches in the order of the batch, also of nested tensors."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        padding = first.new_zeros((num_padding, *first.shape[1:]))
        return torch.cat([*outputs, padding] if num_padding else outputs)
    return type(first)(
        [joined(list(parts), num_padding) for parts in zip(*outputs, strict=True)]
    )
