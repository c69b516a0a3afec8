# SPDX-License-Identifier: Apache-2.0
"""Per-step metadata: encoded once, sent once, reused by all layers of the step."""

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

from vllm_attn_offload.client.node_group import NodeGroup
from vllm_attn_offload.memory_node.step import (
    AttentionStep,
    step_num_bytes,
    write_step,
)

_NOT_SENT = -1


@dataclass(slots=True)
class AttentionOffloadMetadata(AttentionMetadata):
    """One step of one KV group, ready to be sent.

    ``payload`` is the encoded STEP frame; ``num_tokens`` counts real rows only, without
    those that pad the batch to a captured graph's size.
    """

    num_tokens: int
    payload: memoryview
    step: int = _NOT_SENT

    def ensure_sent(self, nodes: NodeGroup) -> int:
        """Send the step with its first layer; returns the step's number.

        Late, because dummy runs build metadata that no layer uses.
        """
        if self.step == _NOT_SENT:
            self.step = nodes.begin_step([(0, self.payload)])
        return self.step


class AttentionOffloadMetadataBuilder(
    AttentionMetadataBuilder[AttentionOffloadMetadata]
):
    """Encodes vLLM's batch for the memory nodes, into a buffer that is kept."""

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
        self._buffer = memoryview(bytearray(0))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AttentionOffloadMetadata:
        """Encode a step.

        Raises:
            ValueError: The batch is not causal.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(
                "Attention offloading does not support non-causal attention. Allowed: "
                "causal attention. Run this model without --attention-offload."
            )
        num_reqs = common.num_reqs
        starts = common.query_start_loc_cpu[: num_reqs + 1].numpy()
        # num_actual_tokens may be padded to a captured graph's size.
        num_tokens = int(starts[-1])
        seq_lens = common.seq_lens[:num_reqs].cpu().numpy()
        width = max(1, -(-int(seq_lens.max()) // self._block_size))
        step = AttentionStep(
            query_start_loc=starts,
            seq_lens=seq_lens,
            slot_mapping=_as_int64(common.slot_mapping[:num_tokens]),
            block_table=common.block_table_tensor[:num_reqs, :width].cpu().numpy(),
        )
        num_bytes = step_num_bytes(num_reqs, num_tokens, width)
        if self._buffer.nbytes < num_bytes:
            self._buffer = memoryview(bytearray(2 * num_bytes))
        write_step(step, self._buffer)
        return AttentionOffloadMetadata(num_tokens, self._buffer[:num_bytes])


def _as_int64(slots: torch.Tensor) -> np.ndarray:
    return slots.to("cpu", torch.int64).numpy()
