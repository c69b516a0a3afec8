# SPDX-License-Identifier: Apache-2.0
"""Recurrent states, which stay on the compute node while attention leaves it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import MambaSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: States begin at multiples of it, in bytes: of a cache line, and of every dtype.
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class ResidentStateSpec(MambaSpec):
    """Layers with a state per request (Mamba, linear attention, short convolutions).

    vLLM takes such states from the pool of KV blocks, whose pages are as large. That
    pool is on the memory nodes here, so each group of these layers has one of its own
    on the compute node, and a request takes nothing for them from the shared one.

    Args:
        pool_size: States of each layer of a group; vLLM hands out all but one.
        max_per_request: The most of them that a request holds at a time.
    """

    pool_size: int
    max_per_request: int

    @classmethod
    def of(
        cls, spec: MambaSpec, pool_size: int, max_per_request: int
    ) -> ResidentStateSpec:
        """Keep everything of ``spec`` but where its states are."""
        kept = {field.name: getattr(spec, field.name) for field in fields(MambaSpec)}
        return cls(**kept, pool_size=pool_size, max_per_request=max_per_request)

    @property
    def state_bytes(self) -> int:
        """Bytes of one state of one layer on the compute node, without vLLM's pad."""
        return state_bytes(self)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the shared pool that a request takes: none."""
        return 0

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Length of a request's row in the block table, as vLLM's own spec has it."""
        if self.mamba_cache_mode == "align":
            return super().max_num_blocks_per_req(vllm_config, max_len)
        return self.max_per_request


def states_per_request(spec: MambaSpec, vllm_config: VllmConfig) -> int:
    """Return the most states of a layer that a request holds at a time."""
    bytes_held = MambaSpec.max_memory_usage_bytes(spec, vllm_config)
    num_held = bytes_held // spec.page_size_bytes
    if spec.mamba_cache_mode == "align":
        # The scheduler frees what only steps before those in flight have read.
        num_held += vllm_config.max_concurrent_batches - 1
    return num_held


def state_bytes(spec: MambaSpec) -> int:
    """Return the bytes of one state of one layer on the compute node."""
    return aligned(spec.state_content_size_bytes)


def aligned(num_bytes: int) -> int:
    """Round up to where a state may begin."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
