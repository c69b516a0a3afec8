# SPDX-License-Identifier: Apache-2.0
"""A request's rows of one step, as attention on the CPU takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: CPUs without bf16 instructions multiply in fp32 several times faster.
_COMPUTES_BF16 = (
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)


@dataclass(frozen=True, slots=True)
class CpuChunk:
    """Views with KV heads first: the query heads of one share its keys.

    Args:
        query: ``[num_kv_heads, group, num_rows, head_size]``.
        key: ``[num_kv_heads, num_rows, head_size]``.
        value: ``[num_kv_heads, num_rows, v_head_size]``.
        output: ``[num_kv_heads, group, num_rows, v_head_size]``, to be filled.
        lse: fp32 ``[num_kv_heads, group, num_rows]``, natural log-sum-exp, to be
            filled.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor

    @property
    def num_rows(self) -> int:
        """Rows of the chunk."""
        return self.query.shape[2]

    def first(self, num_rows: int) -> CpuChunk:
        """View the first rows, which see none of the others."""
        return CpuChunk(
            self.query[:, :, :num_rows],
            self.key[:, :num_rows],
            self.value[:, :num_rows],
            self.output[:, :, :num_rows],
            self.lse[:, :, :num_rows],
        )


def chunk_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> CpuChunk:
    """View a request's rows with heads first.

    Args:
        query: ``[num_rows, num_heads, head_size]``.
        key: ``[num_rows, num_kv_heads, head_size]``.
        value: ``[num_rows, num_kv_heads, v_head_size]``.
        output: ``[num_rows, num_heads, v_head_size]``.
        lse: fp32 ``[num_rows, num_heads]``.
    """
    if query.dtype != torch.float32 and not _COMPUTES_BF16:
        query, key, value = query.float(), key.float(), value.float()
    heads = (key.shape[1], query.shape[1] // key.shape[1])
    return CpuChunk(
        query.unflatten(1, heads).permute(1, 2, 0, 3),
        key.transpose(0, 1),
        value.transpose(0, 1),
        output.unflatten(1, heads).permute(1, 2, 0, 3),
        lse.unflatten(1, heads).permute(1, 2, 0),
    )
