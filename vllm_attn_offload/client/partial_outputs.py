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
        # One more part, which weighs nothing but where no node sees a key: a softmax
        # over no part at all is NaN.
        self._exponents = torch.full((num_parts + 1, *shape[1:], 1), -torch.inf)
        self._exponents[-1] = torch.finfo(torch.float32).min
        self.lse = self._exponents[:-1, ..., 0]

    def part(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of one node."""
        return self.out[index], self.lse[index]

    def merge_into(self, output: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Combine all parts, finite everywhere, by their log-sum-exp, in fp32.

        Args:
            output: ``[num_rows, num_heads, v_head_size]``, filled; 0 where no part sees
                a key.
            lse: ``[num_rows, num_heads]`` fp32, filled, -inf where no part sees a key;
                None: not wanted.
        """
        weights = torch.softmax(self._exponents, dim=0)[:-1]
        if output.dtype == torch.float32:
            torch.sum(self.out * weights, dim=0, out=output)
        else:
            output.copy_(self.out.float().mul_(weights).sum(0))
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
        output: ``[num_tokens, num_heads, v_head_size]``: the local part, 0 where its
            ``lse`` is -inf; filled with the result.
        lse: ``[num_tokens, num_heads]`` fp32 of the local part, -inf: none; filled with
            that of both.
        remote: ``[num_rows, num_heads, v_head_size]``, the nodes' part, finite.
        remote_lse: ``[num_rows, num_heads]`` fp32, -inf where nodes see no key.
        rows: int64 ``[num_rows]``, rows of ``output``; None: all.
    """
    local, seen = (output, lse) if rows is None else (output[rows], lse[rows])
    merged_lse = torch.logaddexp(seen, remote_lse)
    # Where neither part sees a key their difference would be NaN: the local part stays.
    floor = torch.finfo(torch.float32).min
    weight = torch.exp(remote_lse - merged_lse.clamp_min(floor)).unsqueeze(-1)
    merged = torch.lerp(local.float(), remote.float(), weight).to(output.dtype)
    if rows is None:
        output.copy_(merged)
        lse.copy_(merged_lse)
    else:
        output.index_copy_(0, rows, merged)
        lse.index_copy_(0, rows, merged_lse)


def apply_sinks(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Let every head see one more key, of this score and without a value, in place.

    Once, after the last merge: a key that several parts counted would weigh more.

    Args:
        output: ``[num_rows, num_heads, v_head_size]``, of any device; rescaled in fp32.
        lse: ``[num_rows, num_heads]`` fp32 over all keys that a row sees; -inf: none.
        sinks: ``[num_heads]`` of any float type, finite.
    """
    output.mul_(torch.sigmoid(lse - sinks.float()).unsqueeze(-1))
