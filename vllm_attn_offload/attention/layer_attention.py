# SPDX-License-Identifier: Apache-2.0
"""How a layer turns scores into weights: scale, window, soft cap, ALiBi, sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """Attributes of one layer's attention, the same on every part of its keys.

    Scores are scaled, capped, and then biased.

    Args:
        softmax_scale: Factor of ``q k^T``.
        sliding_window: Tokens that a row sees, its own included; 0: all.
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``; 0: they stay.
        alibi_slopes: fp32 ``[num_heads]``, factors of key minus query position (ALiBi,
            arXiv 2108.12409), on the device of q; None: no bias.
        sinks: ``[num_heads]`` of any float type, scores of one more key whose value is
            zero, on the device of q; None: there is none. They enter after the last
            merge.
        k_scale: Unit of the k that are attended to on the compute node, as blocks of
            fp8 have it.
        v_scale: Likewise of v.
    """

    softmax_scale: float
    sliding_window: int = 0
    soft_cap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def score_scale(self) -> float:
        """Factor of ``q k^T`` with k in units of ``k_scale``."""
        return self.softmax_scale * self.k_scale
