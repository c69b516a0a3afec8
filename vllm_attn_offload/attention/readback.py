# SPDX-License-Identifier: Apache-2.0
"""Reads a step's lengths, slots and block rows from vLLM's batch."""

from __future__ import annotations

from typing import Protocol

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_attn_offload.protocol.step import StepMetadata


class StepSource(Protocol):
    """A step that the host has read, or will have."""

    @property
    def num_tokens(self) -> int:
        """Real rows of q, k and v, without padding."""

    @property
    def is_on_host(self) -> bool:
        """Return True if ``batch`` does not wait."""

    @property
    def batch(self) -> StepMetadata:
        """The step on the host."""


class Readback(Protocol):
    """Reads one step after another."""

    def begin(self, common: CommonAttentionMetadata) -> StepSource:
        """Start to read a step; vLLM may prepare the next one at once."""


class HostStep:
    """A step that is on the host.

    Args:
        batch: The step.
    """

    is_on_host = True

    def __init__(self, batch: StepMetadata) -> None:
        self.batch = batch
        # Every layer asks for it.
        self.num_tokens = batch.num_tokens


class HostReadback:
    """Copies a step of a CPU compute node.

    Args:
        block_size: Tokens of a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def begin(self, common: CommonAttentionMetadata) -> HostStep:
        """Copy the step: vLLM prepares the next one in the same tensors."""
        num_reqs = common.num_reqs
        starts = common.query_start_loc_cpu[: num_reqs + 1].numpy()
        # num_actual_tokens may be padded to a captured graph's size.
        num_tokens = int(starts[-1])
        seq_lens = common.seq_lens[:num_reqs].cpu().numpy()
        width = max(1, -(-int(seq_lens.max()) // self._block_size))
        slots = common.slot_mapping[:num_tokens].to("cpu", torch.int64)
        table = common.block_table_tensor[:num_reqs, :width].cpu()
        return HostStep(
            StepMetadata.whole(
                query_start_loc=starts.copy(),
                seq_lens=seq_lens.copy(),
                slot_mapping=slots.numpy().copy(),
                block_table=table.numpy().copy(),
            )
        )
