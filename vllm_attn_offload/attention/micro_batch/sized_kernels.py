# SPDX-License-Identifier: Apache-2.0
"""Matrix products whose kernels are kept by the size of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm._custom_ops import CPUDNNLGEMMHandler

#: More elements than a row has, from one row to the next.
_GAP = 32
_Linear = Callable[..., torch.Tensor]


class SizedKernels:
    """Keeps kernels of a smaller team of threads apart from those of the whole team.

    vLLM keeps oneDNN's kernels by the rows of a product and their stride
    (`csrc/cpu/dnnl_helper.cpp`), and one computes with as many threads as there were
    when it was made: where both teams used it, it would be slow in one of them until
    it is forgotten. Rows that lie further apart have kernels of their own.

    Args:
        model: vLLM's model, loaded.

    Attributes:
        are_apart: Whether products use the kernels of the smaller team.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.are_apart = False
        self._wrapped: list[tuple[torch.nn.Module, _Linear]] = []
        for module in model.modules():
            linear = vars(module).get("cpu_linear")
            if linear is not None and _is_sized(linear):
                self._wrapped.append((module, linear))
                vars(module)["cpu_linear"] = functools.partial(self._run, linear)

    def uninstall(self) -> None:
        """Give the model its own products back."""
        for module, linear in self._wrapped:
            vars(module)["cpu_linear"] = linear

    def _run(self, linear: _Linear, rows: torch.Tensor, *rest: Any) -> torch.Tensor:
        if not self.are_apart:
            return linear(rows, *rest)
        # A row alone has no stride.
        num_rows = rows.numel() // rows.shape[-1]
        apart = _apart(rows, max(num_rows, 2))
        return linear(apart, *rest)[:num_rows].unflatten(0, rows.shape[:-1])


def _is_sized(linear: _Linear) -> bool:
    """Return True for vLLM's products by oneDNN, which its handler computes."""
    cells = getattr(linear, "__closure__", None) or ()
    return any(isinstance(each.cell_contents, CPUDNNLGEMMHandler) for each in cells)


def _apart(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Copy rows ``[..., size]`` to ``[num_rows, size]`` with a larger stride.

    What is not copied to is zero.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    wide = flat.new_empty(num_rows, flat.shape[1] + _GAP)
    wide[: flat.shape[0], : flat.shape[1]] = flat
    wide[flat.shape[0] :] = 0
    return wide[:, : flat.shape[1]]
