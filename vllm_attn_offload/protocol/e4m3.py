# SPDX-License-Identifier: Apache-2.0
"""What blocks of fp8 hold of k and v: both sides round alike.

A block holds ``x / scale`` as e4m3 (4 bits of exponent, 3 of mantissa, no infinity),
which stands for that number times ``scale``. Nothing rounds the product: the scale of
k enters that of the scores, and the scale of v the output.
"""

from __future__ import annotations

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
