# SPDX-License-Identifier: Apache-2.0
"""A small model whose attention layers are offloaded to one real memory node."""

from __future__ import annotations

from typing import Any

import torch
from raw_session import attach_request, make_geometry, reservation, session_of
from vllm.config import CUDAGraphMode
from vllm.forward_context import (
    BatchDescriptor,
    ForwardContext,
    get_forward_context,
    override_forward_context,
)
from worker_batch import WorkerBatch

from vllm_attn_offload.attention.cpu_exchange import CpuExchange
from vllm_attn_offload.attention.impl import AttentionOffloadImpl
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.attention.micro_batch.choice import (
    MicroBatchChoice,
    NumMicroBatches,
)
from vllm_attn_offload.attention.micro_batch.half_team import HalfTeam
from vllm_attn_offload.attention.micro_batch.runner import MicroBatchRunner
from vllm_attn_offload.attention.readback import HostStep
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.partition import Partition
from vllm_attn_offload.client.remote_attention import RemoteAttention

NUM_BLOCKS, BLOCK_SIZE, HIDDEN, VOCABULARY = 200, 16, 96, 50
GEOMETRY = make_geometry(num_layers=3)
#: Three drafts and the token before them.
DECODE_THRESHOLD = 4


class LayeredModel(torch.nn.Module):
    """Attention layers with residuals; positions have three rows, as in M-RoPE."""

    def __init__(self) -> None:
        super().__init__()
        layer = GEOMETRY.layers[0]
        self.graph_modes: list[CUDAGraphMode] = []
        torch.manual_seed(0)
        widths = [layer.num_query_heads, *[layer.num_kv_heads] * 2]
        self.widths = [layer.head_size * heads for heads in widths]
        self.embed = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.qkv = torch.nn.ModuleList(
            torch.nn.Linear(HIDDEN, sum(self.widths)) for _ in GEOMETRY.layers
        )
        self.out = torch.nn.ModuleList(
            torch.nn.Linear(self.widths[0], HIDDEN) for _ in GEOMETRY.layers
        )
        self.impls = [
            AttentionOffloadImpl(
                each.num_query_heads,
                each.head_size,
                each.softmax_scale,
                each.num_kv_heads,
            )
            for each in GEOMETRY.layers
        ]

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states ``[num_tokens, HIDDEN]``, and those before the last layer."""
        assert get_forward_context().is_padding.shape == input_ids.shape
        assert get_forward_context().batch_descriptor.num_tokens == len(input_ids)
        self.graph_modes.append(get_forward_context().cudagraph_runtime_mode)
        hidden = self.embed(input_ids) + positions.sum(0)[:, None] / 100
        before = hidden
        for index, layer in enumerate(GEOMETRY.layers):
            before = hidden
            q, k, v = (
                part.unflatten(1, (-1, layer.head_size))
                for part in self.qkv[index](hidden).split(self.widths, dim=1)
            )
            metadata = get_forward_context().attn_metadata[layer.name]
            output = torch.full_like(
                q, torch.nan, memory_format=torch.contiguous_format
            )
            self.impls[index].forward(None, q, k, v, None, metadata, output)
            hidden = hidden + self.out[index](output.flatten(1))
        return hidden, [before]


class Engine:
    """Steps of a model, as vLLM's model runner makes them.

    Args:
        address: The memory node.
        option: How many micro-batches.
        num_reqs: Requests of the batch.
        tolerate_loss: Of the node group.
        divides_cpus: Cut steps leave half of the CPUs to the node.
    """

    def __init__(
        self,
        address: str,
        option: NumMicroBatches,
        num_reqs: int,
        *,
        tolerate_loss: bool = False,
        divides_cpus: bool = False,
    ) -> None:
        self.control = ControlClient(address, 30)
        reserved = self.control.reserve(reservation(GEOMETRY, 64 << 20))
        opened = self.control.open_session(session_of(reserved.reservation, NUM_BLOCKS))
        client = NodeClient(address, attach_request(opened, GEOMETRY), 30.0)
        self.nodes = RemoteAttention(
            [client],
            Partition("heads", (NUM_BLOCKS,)),
            GEOMETRY,
            tolerate_loss=tolerate_loss,
        )
        self.model = LayeredModel()
        exchange = CpuExchange(self.nodes)
        for index, impl in enumerate(self.model.impls):
            impl.connect(exchange, index)
        half_team = HalfTeam(self.model, 4) if divides_cpus else None
        self.runner = MicroBatchRunner(self.model, MicroBatchChoice(option), half_team)
        self.runner.connect(self.nodes)
        self._requests = WorkerBatch(GEOMETRY, NUM_BLOCKS, num_reqs)

    @torch.inference_mode()
    def step(
        self, num_new: list[int], num_padding: int = 0
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run a step; the tokens depend on the positions alone.

        Args:
            num_new: Rows per request.
            num_padding: Rows that fill the batch to the size of a captured graph.
        """
        batch, _ = self._requests.grow(num_new)
        metadata = AttentionOffloadMetadata(
            HostStep(batch), BLOCK_SIZE, decode_threshold=DECODE_THRESHOLD
        )
        slots = torch.nn.functional.pad(
            torch.as_tensor(batch.slot_mapping), (0, num_padding)
        )
        positions = slots.expand(3, -1) % 97
        context: dict[str, Any] = {
            "no_compile_layers": {},
            "attn_metadata": {layer.name: metadata for layer in GEOMETRY.layers},
            "slot_mapping": {},
            "is_padding": torch.arange(slots.shape[0]) >= batch.num_tokens,
            "batch_descriptor": BatchDescriptor(slots.shape[0]),
        }
        if num_padding:
            context["cudagraph_runtime_mode"] = CUDAGraphMode.PIECEWISE
        whole = ForwardContext(**context)
        with override_forward_context(whole):
            output = self.model(
                input_ids=positions[0] % VOCABULARY,
                positions=positions,
                inputs_embeds=None,
            )
            assert get_forward_context() is whole
        return output

    def close(self) -> None:
        """End the session."""
        self.runner.uninstall()
        self.nodes.close()
        self.control.close()
