# SPDX-License-Identifier: Apache-2.0
"""Outputs of attention over parts of a request's keys, and how they become one."""

from __future__ import annotations

import torch


class PartialOutputs:
    """Replies of the nodes that each hold some of a request's blocks, for one step.

    Rows that a node does not attend for stay at weight zero. ``out`` is
    ``[num_parts, num_rows, num_heads, v_head_size]``, ``lse`` fp32
    ``[num_parts, num_rows, num_heads]``.

    Args:
        num_parts: Number of nodes.
        num_rows: Rows that nodes attend for.
        num_heads: Query heads of the worker.
        v_head_size: Size of one value head.
        dtype: dtype of the outputs.
    """

    def __init__(
        self,
        num_parts: int,
        num_rows: int,
        num_heads: int,
        v_head_size: int,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_parts, num_rows, num_heads)
        self.out = torch.zeros(*shape, v_head_size, dtype=dtype)
        self.lse = torch.full(shape, -torch.inf)

    def merge_into(self, output: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Combine all parts by their log-sum-exp, in fp32.

        Args:
            output: ``[num_rows, num_heads, v_head_size]``, filled.
            lse: ``[num_rows, num_heads]`` fp32, filled; None: not wanted.
        """
        weights = torch.softmax(self.lse, dim=0).unsqueeze(-1)
        output.copy_((self.out.float() * weights).sum(0))
        if lse is not None:
            torch.logsumexp(self.lse, dim=0, out=lse)


def merge_remote(
    output: torch.Tensor,
    lse: torch.Tensor,
    remote: torch.Tensor,
    remote_lse: torch.Tensor,
    rows: torch.Tensor | None,
) -> None:
    """Complete local attention by the part of the nodes, in fp32.

    Args:
        output: ``[num_tokens, num_heads, v_head_size]``: the local part, finite
            everywhere; filled with the result.
        lse: ``[num_tokens, num_heads]`` fp32 of the local part; -inf: none.
        remote: ``[num_rows, num_heads, v_head_size]``, the nodes' part.
        remote_lse: ``[num_rows, num_heads]`` fp32.
        rows: int64 ``[num_rows]``, rows of ``output``; None: all.
    """
    local, seen = (output, lse) if rows is None else (output[rows], lse[rows])
    out = torch.stack((local.float(), remote.float()))
    weights = torch.softmax(torch.stack((seen, remote_lse)), dim=0).unsqueeze(-1)
    merged = (out * weights).sum(0).to(output.dtype)
    if rows is None:
        output.copy_(merged)
    else:
        output.index_copy_(0, rows, merged)
