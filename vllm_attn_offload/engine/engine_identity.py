# SPDX-License-Identifier: Apache-2.0
"""What memory nodes are told about an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.messages import ReserveCapacity, Shard
from vllm_attn_offload.protocol.value_types import MAX_MODEL_CHARS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """An engine in the nodes' logs and metrics.

    Args:
        name: No other engine has it.
        model: Name of its model, as vLLM's own metrics show it; of a longer one the
            beginning, and "?" for what is not printable.
        index: Its data-parallel index.
    """

    name: str
    model: str = ""
    index: int = 0

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> EngineIdentity:
        """Return the identity of the engine of this process."""
        index = vllm_config.parallel_config.data_parallel_index
        model = str(vllm_config.model_config.served_model_name)[:MAX_MODEL_CHARS]
        shown = "".join(each if each.isprintable() else "?" for each in model)
        return cls(f"{vllm_config.instance_id}-{index}", shown, index)

    def request(
        self, shard: Shard, geometry: SessionGeometry, kv_bytes: int
    ) -> ReserveCapacity:
        """Ask for the memory of one of the engine's workers."""
        return ReserveCapacity(
            engine=self.name,
            shard=shard,
            geometry=geometry,
            kv_bytes=kv_bytes,
            model=self.model,
            engine_index=self.index,
        )
