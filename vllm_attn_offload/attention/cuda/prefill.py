# SPDX-License-Identifier: Apache-2.0
"""Attention of prefill chunks on the GPU, by vLLM's FlashAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_attn_offload.attention.cuda.metadata import CudaStep
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.client.partial_outputs import apply_sinks

#: Largest heads of FlashAttention 2 and 3.
_FA_HEAD_SIZE = 256
_FA4 = 4


@dataclass(frozen=True, slots=True)
class RemotePart:
    """Attention output of the nodes, on the device.

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
        attention: LayerAttention,
    ) -> torch.Tensor:
        """Causal attention of every request over its own rows of this step.

        Args:
            qkv: ``[num_tokens, heads, head_size]`` each; k and v in units of the
                layer's scales.
            output: ``[num_tokens, num_heads, head_size]``, filled.
            step: Says which rows are of one request.
            attention: Attributes of the layer.

        Returns:
            ``[num_heads, num_tokens]`` fp32 natural log-sum-exp.
        """

    def merge(
        self, output: torch.Tensor, lse: torch.Tensor, remote: RemotePart
    ) -> None:
        """Merge the nodes' part of the attention into ``output``.

        Args:
            output: ``[num_tokens, num_heads, v_head_size]``, as `attend` filled it.
            lse: ``[num_heads, num_tokens]`` fp32, result of `attend`; of both parts
                afterwards, where ``remote`` has one.
            remote: The other part.
        """

    def add_sinks(
        self, output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
    ) -> None:
        """Let sinks enter, after all parts are merged.

        Args:
            output: ``[num_tokens, num_heads, v_head_size]``, scaled in place.
            lse: ``[num_heads, num_tokens]`` fp32, as `merge` left it.
            sinks: ``[num_heads]``.
        """


class FlashPrefill:
    """``LocalAttention`` by FlashAttention and vLLM's merge kernel."""

    def __init__(self) -> None:
        # Late: vLLM's other builds do not have them, but merge, too.
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_flash_attn_version,
        )

        self._attend = flash_attn_varlen_func
        self._choose_version = get_flash_attn_version
        # By head size, and whether there are slopes and a soft cap.
        self._versions: dict[tuple[int, bool, bool], int] = {}

    def version(self, head_size: int, attention: LayerAttention) -> int:
        """FlashAttention's version for a layer, chosen as vLLM chooses it.

        Args:
            head_size: Of q, k and v.
            attention: Attributes of the layer.

        Raises:
            ValueError: This build or GPU has none for it.
        """
        has_slopes = attention.alibi_slopes is not None
        kind = (head_size, has_slopes, attention.soft_cap > 0)
        if kind not in self._versions:
            version = self._choose_version(
                requires_alibi=kind[1], head_size=head_size, requires_softcap=kind[2]
            )
            if version is None or (head_size > _FA_HEAD_SIZE and version < _FA4):
                raise ValueError(
                    f"Attention offloading attends prefills of head size {head_size} "
                    "with FlashAttention, which vLLM does not have for this GPU. "
                    "Allowed: compute capability 8.0 or newer, and head sizes up to "
                    f"{_FA_HEAD_SIZE} but where FlashAttention 4 runs. Run without "
                    "--attention-offload."
                )
            self._versions[kind] = version
        return self._versions[kind]

    def attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        step: CudaStep,
        attention: LayerAttention,
    ) -> torch.Tensor:
        """Attend as `LocalAttention.attend`; shapes ``[num_tokens, heads, size]``.

        Requests that decode, of up to 16 rows, come along: leaving them out costs more
        than they do.
        """
        query, key, value = qkv
        window = attention.sliding_window
        if attention.alibi_slopes is not None and not window:
            # Hides nothing. FlashAttention 2 without a window biases by the key's
            # place alone: the same output, but another log-sum-exp than the nodes'.
            window = step.max_query_len
        _, lse = self._attend(
            q=query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=step.query_start_loc,
            cu_seqlens_k=step.query_start_loc,
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=step.max_query_len,
            softmax_scale=attention.score_scale,
            causal=True,
            # The row's own token does not count.
            window_size=[window - 1, 0] if window else None,
            softcap=attention.soft_cap,
            alibi_slopes=attention.alibi_slopes,
            return_softmax_lse=True,
            fa_version=self.version(query.shape[2], attention),
        )
        if attention.v_scale != 1.0:
            output.mul_(attention.v_scale)
        return lse

    def merge(
        self, output: torch.Tensor, lse: torch.Tensor, remote: RemotePart
    ) -> None:
        """Merge into ``output`` ``[num_tokens, num_heads, v_head_size]``."""
        merge_remote(output, lse, remote)

    def add_sinks(
        self, output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
    ) -> None:
        """Scale ``output`` ``[num_tokens, num_heads, v_head_size]`` in place."""
        apply_sinks(output, lse.t(), sinks)


def merge_remote(output: torch.Tensor, lse: torch.Tensor, remote: RemotePart) -> None:
    """Merge the nodes' part into local attention, on any device.

    Args:
        output: ``[num_tokens, num_heads, v_head_size]``, the local part.
        lse: ``[num_heads, num_tokens]`` fp32, of the local part; of both afterwards.
        remote: The other part; rows that it does not have stay as they are.
    """
    merged = remote.out
    if remote.lse is not None:
        local_lse = lse.index_select(1, remote.rows)
        local_lse.masked_fill_(remote.is_alone.bool(), -torch.inf)
        merged, merged_lse = torch.empty_like(remote.out), torch.empty_like(local_lse)
        merge_attn_states(
            merged,
            remote.out,
            remote.lse.contiguous(),
            output.index_select(0, remote.rows),
            local_lse,
            merged_lse,
        )
        lse.index_copy_(1, remote.rows, merged_lse)
    output.index_copy_(0, remote.rows, merged)
