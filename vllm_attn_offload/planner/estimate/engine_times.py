# SPDX-License-Identifier: Apache-2.0
"""Times and KV memory of one engine, with memory nodes or without."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_attn_offload.planner.estimate import cost_model as cost
from vllm_attn_offload.planner.estimate.capacity import Capacity
from vllm_attn_offload.planner.estimate.offload import Offload
from vllm_attn_offload.planner.hardware.device_count import DeviceCount
from vllm_attn_offload.planner.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """Seconds of an engine's steps, without contention.

    Attributes:
        compute: Tensor-parallel devices of this engine.
        offload: Memory nodes and network; None: the compute devices attend.
        num_engines: Equal engines, which have equal shares of the memory nodes.
        num_micro_batches: Micro-batches that rotate over n - 1 model replicas.
        prefills: Whether the compute devices also prefill.
    """

    shape: ModelShape
    compute: DeviceCount
    offload: Offload | None = None
    num_engines: int = 1
    num_micro_batches: int = 1
    prefills: bool = True

    def split(self, num_engines: int) -> EngineTimes:
        """One of `num_engines` engines with the devices of this one."""
        compute = self.compute.split(num_engines)
        return replace(self, compute=compute, num_engines=num_engines)

    @property
    def kv_budget(self) -> float:
        """Bytes of KV that this engine can hold; negative if the weights exceed it."""
        if self.offload is None:
            return self._compute_budget
        memory = self.offload.memory
        return cost.memory_budget(memory.device, memory.count / self.num_engines)

    @property
    def _compute_budget(self) -> float:
        """Bytes of the compute devices that weights leave."""
        budget = cost.memory_budget(self.compute.device, self.compute.count)
        return budget - self.shape.weight_bytes

    def capacity(self, context: float) -> Capacity:
        """Requests of `context` tokens whose KV and recurrent states fit.

        Memory nodes hold the KV alone; without them the compute devices hold both.
        """
        states = self.shape.held_state_bytes
        kv = self.shape.kv_bytes(context)
        if self.offload is None:
            return Capacity("memory", self._compute_budget, kv + states)
        nodes = Capacity("memory", self.kv_budget, kv)
        compute = Capacity("states", self._compute_budget, states)
        return min(nodes, compute, key=lambda capacity: capacity.num_requests)

    def decode(
        self, rows: float, context: float, num_micro_batches: int
    ) -> tuple[float, float, float]:
        """Model, attention and wire time of one of `num_micro_batches`.

        Args:
            rows: Requests of the micro-batch.
            context: Cached tokens of a request.
        """
        shape, compute, tp = self.shape, self.compute.device, self.compute.count
        size = self._replica_size(num_micro_batches)
        model_s = cost.layers_time(shape, compute, size, rows)
        model_s += cost.state_time(shape, compute, size, rows)
        if self.offload is None:
            attention_s = cost.attention_time(shape, compute, tp, rows, context)
            return model_s, attention_s, 0.0
        memory, network = self.offload.memory, self.offload.network
        share = memory.count / self.num_engines
        partition = self.offload.resolved_partition(shape)
        ports = min(tp, share)
        return (
            model_s,
            cost.attention_time(shape, memory.device, share, rows, context),
            cost.wire_time(shape, network, rows, memory.count, ports, partition),
        )

    def overhead(self, batch: float) -> float:
        """Output head, sampling and scheduling of a step with `batch` requests."""
        size = self._replica_size(self.num_micro_batches)
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

    def send_prompt(self, tokens: float) -> float:
        """Transfer of a prompt's KV to the memory nodes."""
        if self.offload is None:
            return 0.0
        ports = min(self.compute.count, self.offload.memory.count / self.num_engines)
        bytes_per_s = self.offload.network.bytes_per_s * ports
        return self.shape.kv_bytes(tokens) / bytes_per_s

    def _replica_size(self, num_micro_batches: int) -> int:
        """Devices of each of the model replicas that micro-batches rotate over."""
        return self.compute.count // max(num_micro_batches - 1, 1)
