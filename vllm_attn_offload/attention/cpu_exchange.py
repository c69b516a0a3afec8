# SPDX-License-Identifier: Apache-2.0
"""A layer's attention from a CPU: post q, k, v, attend prefills, collect the rest."""

from __future__ import annotations

import torch

from vllm_attn_offload.attention.kept_kv import KeptKV
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.layer_exchange import LayerExchange, Qkv
from vllm_attn_offload.attention.local_prefill import LocalPrefill
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.client.partial_outputs import apply_sinks, merge_remote
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.client.sent_step import SentStep


class CpuExchange(LayerExchange):
    """Exchanges layers whose rows are in host memory.

    Args:
        nodes: Data channels of the worker.
    """

    def __init__(self, nodes: RemoteAttention) -> None:
        self._nodes = nodes
        self._kept = KeptKV(nodes.geometry)
        self._prefill = LocalPrefill()

    def attend(
        self,
        metadata: AttentionOffloadMetadata,
        layer: int,
        qkv: Qkv,
        output: torch.Tensor,
        attention: LayerAttention,
    ) -> None:
        nodes, sinks = self._nodes, attention.sinks
        is_first = metadata.step is None
        step = metadata.step or metadata.ensure_sent(nodes, layer)
        is_alone = not is_first and metadata.baton is None and sinks is None
        if is_alone and step.remote_rows is None and not step.partition.prefills:
            nodes.exchange(step, layer, *qkv, output)
            return
        nodes.post_layer(step, layer, *qkv, with_lse=sinks is not None)
        if is_first:
            metadata.send_later(nodes)
        prefills = step.partition.prefills
        if step.remote_rows is None and not prefills:
            if metadata.baton is not None:
                metadata.let_others_compute()
            self._collect_all(step, layer, output, sinks)
            return
        lse = None
        if prefills:
            key, value = self._kept.local_kv(metadata, layer, qkv)
            rows = (qkv[0], key, value, output)
            lse = self._prefill.attend(*rows, prefills, attention)
        metadata.let_others_compute()
        self._collect_part(step, layer, output, lse, sinks)

    def close(self) -> None:
        """Do nothing: threads end with the object."""

    def _collect_all(
        self,
        step: SentStep,
        layer: int,
        output: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """Take an output that is the nodes' alone."""
        if sinks is None:
            self._nodes.collect(step, layer, output)
            return
        lse = torch.empty(output.shape[:2])
        self._nodes.collect(step, layer, output, lse)
        apply_sinks(output, lse, sinks)

    def _collect_part(
        self,
        step: SentStep,
        layer: int,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Complete the local part by that of the nodes."""
        rows = step.remote_rows
        num_rows = output.shape[0] if rows is None else rows.shape[0]
        remote = output.new_empty(num_rows, *output.shape[1:])
        if sinks is not None and lse is None:
            # Rows that nobody attends for are those that only pad the batch.
            lse = torch.full(output.shape[:2], -torch.inf)
            output.zero_()
        if lse is None or not (step.partition.needs_merge or sinks is not None):
            self._nodes.collect(step, layer, remote)
            if rows is None:
                output.copy_(remote)
            else:
                output.index_copy_(0, rows, remote)
            return
        remote_lse = lse.new_empty(remote.shape[:2])
        self._nodes.collect(step, layer, remote, remote_lse)
        merge_remote(output, lse, remote, remote_lse, rows)
        if sinks is not None:
            apply_sinks(output, lse, sinks)
