# SPDX-License-Identifier: Apache-2.0
"""Per-step metadata: taken once, sent once, reused by all layers of the step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_attn_offload.attention.cuda.metadata import CudaReadback, CudaStep
from vllm_attn_offload.attention.cuda.streams import CudaStreams
from vllm_attn_offload.attention.micro_batch.baton import Baton
from vllm_attn_offload.client.remote_attention import RemoteAttention, SentStep
from vllm_attn_offload.client.step_partition import BatchStep


@dataclass(slots=True)
class AttentionOffloadMetadata(AttentionMetadata):
    """One step of one KV group, or one micro-batch of it.

    ``source`` counts real rows only, without those that pad the batch to a captured
    graph's size. With a ``baton`` another micro-batch computes in turns with this one.
    """

    source: BatchStep | CudaStep
    micro_batch: int = 0
    step: SentStep | None = None
    baton: Baton | None = None

    @property
    def batch(self) -> BatchStep:
        """The step; on a GPU it may have to be waited for."""
        source = self.source
        return source if isinstance(source, BatchStep) else source.batch

    @property
    def num_tokens(self) -> int:
        """Real rows of q, k and v."""
        return self.source.num_tokens

    def ensure_sent(self, nodes: RemoteAttention) -> SentStep:
        """Send the step with its first layer.

        Late, because dummy runs build metadata that no layer uses.
        """
        if self.step is None:
            self.step = nodes.begin_step(self.batch, self.micro_batch)
        return self.step

    def let_others_compute(self) -> None:
        """Pass the baton on, where there is one; returns when it is back."""
        if self.baton is not None:
            self.baton.pass_on(self.micro_batch)


class AttentionOffloadMetadataBuilder(
    AttentionMetadataBuilder[AttentionOffloadMetadata]
):
    """Takes from vLLM's batch what the memory nodes need to know."""

    # Attention leaves the device, so it runs between captured graphs (PIECEWISE).
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block_size = kv_cache_spec.block_size
        self._readback: CudaReadback | None = None
        if device.type == "cuda":
            self._readback = CudaReadback(CudaStreams(device), self._block_size)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AttentionOffloadMetadata:
        """Describe a step.

        Raises:
            ValueError: The batch is not causal.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(
                "Attention offloading does not support non-causal attention. Allowed: "
                "causal attention. Run this model without --attention-offload."
            )
        if self._readback is not None:
            return AttentionOffloadMetadata(self._readback.begin(common))
        num_reqs = common.num_reqs
        starts = common.query_start_loc_cpu[: num_reqs + 1].numpy()
        # num_actual_tokens may be padded to a captured graph's size.
        num_tokens = int(starts[-1])
        seq_lens = common.seq_lens[:num_reqs].cpu().numpy()
        width = max(1, -(-int(seq_lens.max()) // self._block_size))
        # Copies: vLLM prepares the next step in the same tensors.
        batch = BatchStep(
            query_start_loc=starts.copy(),
            seq_lens=seq_lens.copy(),
            slot_mapping=_as_int64(common.slot_mapping[:num_tokens]),
            block_table=common.block_table_tensor[:num_reqs, :width]
            .cpu()
            .numpy()
            .copy(),
        )
        return AttentionOffloadMetadata(batch)


def _as_int64(slots: torch.Tensor) -> np.ndarray:
    return slots.to("cpu", torch.int64).numpy().copy()
