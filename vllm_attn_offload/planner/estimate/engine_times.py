# SPDX-License-Identifier: Apache-2.0
"""Times of one engine's steps, with memory nodes or without."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """Seconds of an engine's steps, without contention.

    Attributes:
        compute: Tensor-parallel devices of this engine.
        offload: Memory nodes and network; None: the compute devices attend.
        num_engines: Engines that use the memory nodes in equal shares.
        num_micro_batches: Micro-batches that rotate over n - 1 model replicas.
        prefills: Whether the compute devices also prefill.
    """

    shape: ModelShape
    compute: DeviceCount
    offload: Offload | None = None
    num_engines: int = 1
    num_micro_batches: int = 1
    prefills: bool = True

    def decode(
        self, rows: float, context: float, num_micro_batches: int
    ) -> tuple[float, float, float]:
        """Model, attention and wire time of one of `num_micro_batches`.

        Args:
            rows: Requests of the micro-batch.
            context: Cached tokens of a request.
        """
        shape, compute, tp = self.shape, self.compute.device, self.compute.count
        size = self.replica_size(num_micro_batches)
        model_s = cost.layers_time(shape, compute, size, rows)
        if self.offload is None:
            attention_s = cost.attention_time(shape, compute, tp, rows, context)
            return model_s, attention_s, 0.0
        memory, network = self.offload.memory, self.offload.network
        share = memory.count / self.num_engines
        partition = self.offload.resolved_partition(shape)
        return (
            model_s,
            cost.attention_time(shape, memory.device, share, rows, context),
            cost.wire_time(
                shape, network, rows, memory.count, min(tp, share), partition
            ),
        )

    def overhead(self, batch: float) -> float:
        """Output head, sampling and scheduling of a step with `batch` requests."""
        size = self.replica_size(self.num_micro_batches)
        return cost.overhead_time(self.shape, self.compute.device, size, batch)

    def prefill(self, tokens: float, context: float | None = None) -> float:
        """Prefill of `tokens`; 0 where it runs elsewhere.

        Args:
            context: Tokens that a prompt token attends to on average; None: half of
                `tokens`, one causal prompt.
        """
        if not self.prefills:
            return 0.0
        device, tp = self.compute.device, self.compute.count
        return cost.prefill_time(self.shape, device, tp, tokens, context)

    def replica_size(self, num_micro_batches: int) -> int:
        """Devices of each of the model replicas that micro-batches rotate over."""
        return self.compute.count // max(num_micro_batches - 1, 1)
