# SPDX-License-Identifier: Apache-2.0
"""A deployment with memory nodes."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.hardware.network import Network
from vllm_attn_offload.planner.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Offload:
    """Compute devices of one or more engines, and memory nodes; a network port each.

    ``partition`` is "heads", "blocks", or "auto" (heads where they divide evenly).
    """

    compute: DeviceCount
    memory: DeviceCount
    network: Network
    partition: str = "auto"

    def resolved_partition(self, shape: ModelShape) -> str:
        """Head partition where it divides evenly, else block partition.

        Raises:
            ValueError: Head partition was asked for and does not divide.
        """
        kv_heads = min(layer.num_kv_heads for layer in shape.layers)
        even = kv_heads % self.memory.count == 0
        if self.partition == "heads" and not even:
            allowed = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
            raise ValueError(
                f"{self.memory.count} memory nodes cannot split {kv_heads} KV heads "
                f"evenly. Allowed: {', '.join(map(str, allowed))}. Use one of these, "
                "or --partition blocks."
            )
        if self.partition == "auto":
            return "heads" if even else "blocks"
        return self.partition
