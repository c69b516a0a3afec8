# SPDX-License-Identifier: Apache-2.0
"""Per-step metadata: taken once, sent once, reused by all layers of the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_attn_offload.attention.micro_batch.baton import Baton
from vllm_attn_offload.attention.readback import HostReadback, Readback, StepSource
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.client.sent_step import SentStep
from vllm_attn_offload.client.step_partition import MAX_DECODE_ROWS
from vllm_attn_offload.protocol.step import StepMetadata


@dataclass(slots=True)
class AttentionOffloadMetadata(AttentionMetadata):
    """One step of one KV cache group, or one micro-batch of it.

    ``source`` counts real rows only, without those that pad the batch to a captured
    graph's size. ``block_size`` is in tokens. With a ``baton`` another micro-batch
    computes in turns with this one. ``kept`` are k and v, by their storage, of layers
    whose KV others share: ``[num_tokens, num_kv_heads, size]`` each. ``layer_name`` is
    one of the group's layers, ``later`` the same step of the group that comes next.
    Requests of up to ``decode_threshold`` rows decode: nodes attend for all of these.
    ``is_drafter`` where no layer of the target model is in the group. ``on_half``:
    this worker leaves half of the CPUs that it shares with its node to it.
    """

    source: StepSource
    block_size: int
    micro_batch: int = 0
    step: SentStep | None = None
    baton: Baton | None = None
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    layer_name: str = ""
    later: AttentionOffloadMetadata | None = None
    decode_threshold: int = 1
    is_drafter: bool = False
    on_half: bool = False

    @property
    def batch(self) -> StepMetadata:
        """The step; on a GPU it may have to be waited for."""
        return self.source.batch

    @property
    def num_tokens(self) -> int:
        """Real rows of q, k and v."""
        return self.source.num_tokens

    def ensure_sent(self, nodes: RemoteAttention, layer: int) -> SentStep:
        """Send the step with its first layer, an index in the session's geometry.

        Late, because dummy runs build metadata that no layer uses.
        """
        if self.step is None:
            group = nodes.geometry.layers[layer].group
            self.step = nodes.begin_step(
                *(self.batch, self.micro_batch, group, self.decode_threshold),
                on_half=self.on_half,
            )
        return self.step

    def send_later(self, nodes: RemoteAttention) -> None:
        """Send the next group's step while nodes attend the first layer of this one.

        They plan it while the layer after that is computed.
        """
        if self.later is not None and self.later.step is None:
            layer = nodes.layer_index[self.later.layer_name]
            self.later.ensure_sent(nodes, layer)

    def let_others_compute(self) -> None:
        """Pass the baton on, where there is one; returns when it is back."""
        if self.baton is not None:
            self.baton.pass_on(self.micro_batch)


class AttentionOffloadMetadataBuilder(
    AttentionMetadataBuilder[AttentionOffloadMetadata]
):
    """Takes from vLLM's batch what the memory nodes need to know.

    vLLM makes a builder for every backend, spec and number of query heads in a KV
    group, and asks one after another about the same batch: they share its metadata,
    because a step is sent once for all layers of a group. Each pass of a drafter is a
    step of its own; a group of its layers alone has no part in the target's.
    """

    _latest: ClassVar[tuple[CommonAttentionMetadata, AttentionOffloadMetadata] | None]
    _latest = None
    # Of the target's groups.
    _last_of_target: ClassVar[
        tuple[CommonAttentionMetadata, AttentionOffloadMetadata] | None
    ] = None
    _draft_pass: ClassVar[tuple[CommonAttentionMetadata, int] | None] = None
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
        self._layer_name = layer_names[0]
        self._block_size = kv_cache_spec.block_size
        self._readback = _readback(device, self._block_size)
        self._decode_threshold = _decode_threshold(vllm_config)
        self._is_drafter = _are_drafters(layer_names, vllm_config)

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
        if common_attn_metadata.causal is not True:
            raise ValueError(
                "Attention offloading does not support non-causal attention. Allowed: "
                "causal attention. Run this model without --attention-offload."
            )
        latest = AttentionOffloadMetadataBuilder._latest
        if latest is not None and latest[0] is common_attn_metadata:
            latest[1].is_drafter &= self._is_drafter
            return latest[1]
        source = self._readback.begin(common_attn_metadata)
        metadata = AttentionOffloadMetadata(
            source,
            self._block_size,
            layer_name=self._layer_name,
            decode_threshold=self._decode_threshold,
            is_drafter=self._is_drafter,
        )
        described = (common_attn_metadata, metadata)
        AttentionOffloadMetadataBuilder._latest = described
        if not self._is_drafter:
            # Groups of one step share all but their tables and slots.
            starts = common_attn_metadata.query_start_loc_cpu
            before = self._last_of_target
            if before is not None and before[0].query_start_loc_cpu is starts:
                before[1].later = metadata
            AttentionOffloadMetadataBuilder._last_of_target = described
        return metadata

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> AttentionOffloadMetadata:
        """Describe a pass of the drafter.

        Its first one gets the object that described the target's step, and later ones
        the same object, changed in place: identity alone does not tell them apart.
        """
        described, index = self._draft_pass or (None, 0)
        if described is not common_attn_metadata or index != draft_index:
            builder = AttentionOffloadMetadataBuilder
            builder._draft_pass = (common_attn_metadata, draft_index)
            builder._latest = builder._last_of_target = None
        return super().build_for_drafting(common_attn_metadata, draft_index)


def _are_drafters(layer_names: list[str], vllm_config: VllmConfig) -> bool:
    context = vllm_config.compilation_config.static_forward_context
    layers = [context[name] for name in layer_names if name in context]
    return bool(layers) and all(layer.impl.is_drafter for layer in layers)


def _decode_threshold(vllm_config: VllmConfig) -> int:
    """Most rows of a request in a step that verifies drafts, or makes them."""
    speculation = vllm_config.speculative_config
    if speculation is None:
        return 1
    num_verified = 1 + speculation.num_speculative_tokens
    # Some drafters append rows of their own to those.
    num_rows = num_verified + speculation.max_num_new_slots_for_drafting
    return min(num_rows, MAX_DECODE_ROWS)


def _readback(device: torch.device, block_size: int) -> Readback:
    if device.type != "cuda":
        return HostReadback(block_size)
    # Late: a CPU compute node needs nothing of them.
    from vllm_attn_offload.attention.cuda.metadata import CudaReadback
    from vllm_attn_offload.attention.cuda.streams import CudaStreams

    return CudaReadback(CudaStreams(device), block_size)
