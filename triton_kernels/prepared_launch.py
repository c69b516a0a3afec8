# SPDX-License-Identifier: Apache-2.0
"""Launches that are repeated with other tensors of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

#: Triton compiles another kernel for pointers that are no multiple of so many bytes.
_ALIGNMENT = 16


class PreparedLaunch:
    """A launch of a kernel, and what later ones with other pointers need.

    Triton binds, specialises and looks up every argument of every launch: 61 us for the
    fifty of decode attention on the host of an H200, 19 us with the compiled kernel at
    hand. The first launch is made when constructed.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Of one, two or three dimensions.
        arguments: Every argument and option by name. Tensors that do not vary are kept.
        varying: Names of the tensors that later launches replace.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Mapping[str, Any],
        varying: tuple[str, ...],
    ) -> None:
        compiled = kernel[grid](**arguments)
        self._run: Any = None
        if compiled is None:  # the interpreter compiles nothing
            return
        names = list(kernel.arg_names)
        # Not those that vary: a cache must be free once its owner drops it.
        self._kept = [arguments[name] for name in names if name not in varying]
        self._values = [_plain(arguments[name]) for name in names]
        self._varying = [
            (name, names.index(name), self._values[names.index(name)] % _ALIGNMENT)
            for name in varying
            if name in arguments
        ]
        self._run = compiled[(*grid, 1, 1)[:3]]

    def again(self, pointers: Mapping[str, int], stream: int) -> bool:
        """Launch with other tensors, all else being equal.

        Args:
            pointers: Addresses on the device, of the tensors that vary.
            stream: Handle of the CUDA stream.

        Returns:
            False where these tensors need another kernel: nothing was launched.
        """
        if self._run is None:
            return False
        values = self._values
        for name, place, offset in self._varying:
            pointer = pointers[name]
            if pointer % _ALIGNMENT != offset:
                return False
            values[place] = pointer
        self._run(*values, stream=stream)
        return True


def _plain(value: Any) -> Any:
    """A tensor's address in its place: launching it asks the driver about tensors."""
    return value.data_ptr() if isinstance(value, torch.Tensor) else value
