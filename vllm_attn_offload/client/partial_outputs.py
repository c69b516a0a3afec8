# SPDX-License-Identifier: Apache-2.0
"""Outputs of attention over parts of a request's keys, and how they become one."""

from __future__ import annotations

import torch


class PartialOutputs:
    """Where the nodes' replies of one step are received.

    A part is what one node attended; in a partition by heads the nodes fill different
    heads of the same part. Rows that a node does not attend for stay at weight zero.

    Args:
        num_parts: Parts of a row's keys on the nodes.
        num_rows: Rows that nodes attend for.
        num_heads: Query heads of the worker.
        v_head_size: Of a head's output.
        dtype: Of the outputs.
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

    def merge_into(
        self,
        output: torch.Tensor,
        rows: torch.Tensor | None,
        local_lse: torch.Tensor | None,
    ) -> None:
        """Combine all parts by their log-sum-exp, in fp32.

        Args:
            output: ``[num_tokens, num_heads, v_head_size]``: with ``local_lse`` it
                holds the local part; filled with the result.
            rows: Rows of ``output`` that the parts are of; None: all.
            local_lse: ``[num_tokens, num_heads]`` fp32 of what ``output`` holds; None:
                nothing. Rows at -inf must hold finite numbers.
        """
        out, lse = self.out.float(), self.lse
        if local_lse is not None:
            local = output if rows is None else output[rows]
            out = torch.cat((out, local.float()[None]))
            seen = local_lse if rows is None else local_lse[rows]
            lse = torch.cat((lse, seen[None]))
        weights = torch.softmax(lse, dim=0).unsqueeze(-1)
        merged = (out * weights).sum(0).to(output.dtype)
        if rows is None:
            output.copy_(merged)
        else:
            output.index_copy_(0, rows, merged)
