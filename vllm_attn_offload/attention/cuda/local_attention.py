# SPDX-License-Identifier: Apache-2.0
"""What an exchange needs of attention kernels on the compute device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_attn_offload.attention.cuda.metadata import CudaStep


@dataclass(frozen=True, slots=True)
class RemotePart:
    """What nodes attended, on the device.

    Args:
        out: ``[num_rows, num_heads, v_head_size]``.
        lse: ``[num_heads, num_rows]`` fp32; None where no row has a local part, too.
        rows: int64 ``[num_rows]``, rows of the batch.
        is_alone: bool ``[num_rows]``, rows whose local part does not count.
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    rows: torch.Tensor
    is_alone: torch.Tensor


class LocalAttention(Protocol):
    """Enqueues attention on the compute stream."""

    def attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        step: CudaStep,
        softmax_scale: float,
    ) -> torch.Tensor:
        """Causal attention of every request over its own rows of this step.

        Args:
            qkv: ``[num_tokens, heads, head_size]`` each.
            output: ``[num_tokens, num_heads, head_size]``, filled.
            step: Says which rows are of one request.
            softmax_scale: Factor of ``q k^T``.

        Returns:
            ``[num_heads, num_tokens]`` fp32 natural log-sum-exp.
        """

    def merge(
        self, output: torch.Tensor, lse: torch.Tensor, remote: RemotePart
    ) -> None:
        """Complete ``output`` by what nodes attended.

        Args:
            output: As `attend` filled it.
            lse: Result of `attend`.
            remote: The other part.
        """
