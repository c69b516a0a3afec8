# SPDX-License-Identifier: Apache-2.0
"""What blocks of fp8 hold of k and v: both sides round alike.

A block holds ``x / scale`` as e4m3 (4 bits of exponent, 3 of mantissa, no infinity),
which stands for that number times ``scale``. Nothing rounds the product: the scale of
k enters that of the scores, and the scale of v the output.
"""

from __future__ import annotations

import functools

import torch

#: What is larger is stored as this.
E4M3_MAX = 448.0


def to_e4m3(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Divide in fp32, saturate, round half to even; NaN stays NaN.

    Args:
        rows: k or v, of any shape, float type and device.
        scale: Of the layer.

    Returns:
        float8_e4m3fn of the same shape, in units of ``scale``.
    """
    numbers = rows.float()
    if scale != 1.0:
        # A tensor: torch multiplies by the inverse of a number on GPUs.
        numbers = numbers / torch.full(
            (), scale, dtype=torch.float32, device=rows.device
        )
    return numbers.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_to_e4m3(rows: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Fill ``out`` with `to_e4m3` in a dtype of its own, each number exactly.

    Args:
        rows: k or v, of any shape, float type and device.
        scale: Of the layer.
        out: bf16, fp16 or fp32 of the same shape, contiguous, on the same device.
    """
    rounded = to_e4m3(rows, scale)
    if out.device.type != "cpu":
        out.copy_(rounded)
        return
    # torch converts from fp8 on CPUs one by one: this takes a fifth of the time.
    codes = rounded.view(torch.uint8).flatten().int()
    torch.index_select(_numbers(out.dtype), 0, codes, out=out.view(-1))


@functools.cache
def _numbers(dtype: torch.dtype) -> torch.Tensor:
    """``[256]``, the number of each code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
