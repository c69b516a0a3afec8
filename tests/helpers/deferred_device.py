# SPDX-License-Identifier: Apache-2.0
"""A device of host memory whose streams run as late, or as early, as they may.

A stream that runs late has done nothing that nobody waited for; one that runs early
overwrites at once what somebody else still needs. New memory holds NaN. Together they
turn a missing dependency into a wrong result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

import torch

from vllm_attn_offload.attention.cpu_prefill import attend_locally
from vllm_attn_offload.attention.cuda.metadata import CudaStep
from vllm_attn_offload.attention.cuda.prefill import RemotePart, merge_remote
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.client.partial_outputs import apply_sinks
from vllm_attn_offload.client.step_partition import Prefill

Order = Literal["fork", "join", "wait"]
Pace = Literal["late", "early", "kernels-early"]


class _Queue:
    """What a stream still has to run, in order."""

    def __init__(self) -> None:
        self.work: list[tuple[Callable[[], object], tuple[_Queue, int] | None]] = []
        self.num_done = 0

    def run_to(self, position: int) -> None:
        while self.num_done < position:
            work, after = self.work[self.num_done]
            if after is not None:
                after[0].run_to(after[1])
            work()
            self.num_done += 1


class DeferredDevice:
    """The compute stream, and how streams behave.

    Args:
        pace: Which streams run as early as they may; the others run late.
        without: An order that its streams leave out.
    """

    def __init__(self, pace: Pace, *, without: Order | None = None) -> None:
        self._pace = pace
        self.without = without
        self.compute = _Queue()
        self.lock = threading.RLock()
        self._queues = [self.compute]

    def add_queue(self) -> _Queue:
        """A copy stream."""
        self._queues.append(_Queue())
        return self._queues[-1]

    def enqueue(
        self,
        queue: _Queue,
        work: Callable[[], object],
        after: tuple[_Queue, int] | None = None,
    ) -> None:
        """Add work to a stream; it begins once another one is ``after``."""
        with self.lock:
            queue.work.append((work, after))
            if self._pace == "early" or (
                self._pace == "kernels-early" and queue is self.compute
            ):
                queue.run_to(len(queue.work))

    def launch(self, work: Callable[[], object]) -> None:
        """Add work to the compute stream."""
        self.enqueue(self.compute, work)

    def finish(self) -> None:
        """Run what is left, kernels first."""
        with self.lock:
            for queue in self._queues:
                queue.run_to(len(queue.work))


class DeferredStreams:
    """``DeviceStreams`` of a deferred device."""

    def __init__(self, device: DeferredDevice) -> None:
        self._device = device
        self._copies = device.add_queue()
        self._host_buffers: list[torch.Tensor] = []

    def launch(self, kernels: Callable[[], object]) -> None:
        self._device.launch(kernels)

    def fork(self) -> None:
        compute = self._device.compute
        if self._device.without != "fork":
            self._device.enqueue(self._copies, _nothing, (compute, len(compute.work)))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        (host,) = [each for each in (target, source) if self._is_host(each)]
        assert host.is_contiguous()
        self._device.enqueue(self._copies, lambda: target.copy_(source))

    def mark(self) -> DeferredMark:
        return DeferredMark(self._device, self._copies, len(self._copies.work))

    def computed(self) -> DeferredMark:
        compute = self._device.compute
        return DeferredMark(self._device, compute, len(compute.work))

    def join(self) -> None:
        copies = self._copies
        if self._device.without != "join":
            self._device.enqueue(
                self._device.compute, _nothing, (copies, len(copies.work))
            )

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        buffer = torch.full((num_bytes,), 255, dtype=torch.uint8)
        self._host_buffers.append(buffer)
        return buffer

    def device_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    def _is_host(self, tensor: torch.Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(address == buffer.data_ptr() for buffer in self._host_buffers)


class DeferredMark:
    """A place in a stream."""

    def __init__(self, device: DeferredDevice, queue: _Queue, position: int) -> None:
        self._device, self._queue, self._position = device, queue, position

    def wait(self) -> None:
        if threading.current_thread().name.startswith("store-layers"):
            # Whoever does not wait for this thread is far ahead of it.
            time.sleep(0.05)
        if self._device.without != "wait":
            with self._device.lock:
                self._queue.run_to(self._position)


class DeferredAttention:
    """``LocalAttention`` on the compute stream of a deferred device."""

    def __init__(self, device: DeferredDevice) -> None:
        self._device = device

    def attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        step: CudaStep,
        attention: LayerAttention,
    ) -> torch.Tensor:
        query = qkv[0]
        lse = torch.full((query.shape[1], query.shape[0]), torch.nan)

        def kernels() -> None:
            starts = step.query_start_loc.tolist()
            whole = [
                Prefill(begin, end, False)
                for begin, end in zip(starts, starts[1:], strict=False)
            ]
            lse.copy_(attend_locally(*qkv, output, whole, attention).t())

        self._device.launch(kernels)
        return lse

    def merge(
        self, output: torch.Tensor, lse: torch.Tensor, remote: RemotePart
    ) -> None:
        self._device.launch(lambda: merge_remote(output, lse, remote))

    def add_sinks(
        self, output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
    ) -> None:
        self._device.launch(lambda: apply_sinks(output, lse.t(), sinks))


def _nothing() -> None:
    """What only waits."""
