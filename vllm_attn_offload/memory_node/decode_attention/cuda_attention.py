# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels over blocks in GPU memory.

Kernels of all sessions run in order on one stream; rows and results cross the bus on
two others, through pinned memory, or stay in memory that the worker maps. ``finish``
waits, without the node's lock: another session's kernels run while rows come back.

Every method that enqueues begins by choosing the thread's current stream, which nothing
else in a node relies on: ``torch.cuda.stream`` takes 16 us, and a layer three of them.
"""

from __future__ import annotations

import torch

from vllm_attn_offload.memory_node.decode_attention.base import (
    LayerCall,
    SharedRowsAttention,
)
from vllm_attn_offload.memory_node.decode_attention.kernel_plan import (
    TORCH_DTYPES,
    KernelPlan,
    round_up,
)
from vllm_attn_offload.memory_node.decode_attention.layer_launches import LayerLaunches
from vllm_attn_offload.memory_node.decode_attention.triton_attention import (
    Pool,
    TritonKernels,
    store_rows,
)
from vllm_attn_offload.protocol.geometry import SessionGeometry
from vllm_attn_offload.protocol.layer import PayloadLayout, TokenLayout
from vllm_attn_offload.protocol.step import StepMetadata
from vllm_attn_offload.transport.cuda_memory import CudaDevice


class CudaRegion:
    """Zeroed bytes in GPU memory, given back by ``close``."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._num_bytes = num_bytes
        self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        # Zeroed on the caller's stream, used on another.
        torch.cuda.synchronize(device)

    def __len__(self) -> int:
        return self._num_bytes

    def close(self) -> None:
        """Give the memory back to the driver, where other processes can have it."""
        torch.cuda.synchronize(self.bytes.device)
        self.bytes = self.bytes.new_empty(0)
        torch.cuda.empty_cache()


class _Mirror:
    """The same bytes in pinned and in GPU memory; grows between steps.

    Args:
        row_bytes: Bytes of a row of the largest layer.
        device: The GPU.
    """

    def __init__(self, row_bytes: int, device: torch.device) -> None:
        self._row_bytes = row_bytes
        self.host = torch.empty(0, dtype=torch.uint8)
        self.device = torch.empty(0, dtype=torch.uint8, device=device)

    def reserve(self, num_rows: int) -> None:
        """Make room for ``num_rows``; what was there is lost."""
        num_bytes = num_rows * self._row_bytes
        if self.device.numel() < num_bytes:
            room = round_up(num_bytes)
            self.host = torch.empty(room, dtype=torch.uint8, pin_memory=True)
            self.device = self.device.new_empty(room)


class _CudaKernelPlan(KernelPlan):
    """A plan with room for the rows and results of its largest layer."""

    def __init__(
        self, group: int, geometry: SessionGeometry, device: torch.device
    ) -> None:
        super().__init__(group, geometry, device)
        layers = [layer for layer in geometry.layers if layer.group == group]
        item_bytes = TORCH_DTYPES[geometry.dtype].itemsize
        rows = [TokenLayout.of(layer) for layer in layers]
        self.qkv = _Mirror(item_bytes * max(row.width for row in rows), device)
        self.out = _Mirror(item_bytes * max(row.out for row in rows), device)
        self.lse = _Mirror(4 * max(layer.num_query_heads for layer in layers), device)
        self.received = torch.cuda.Event()
        self.consumed = torch.cuda.Event()
        self.returned = torch.cuda.Event()
        self.launches = LayerLaunches()

    def rows_of(self, call: LayerCall) -> torch.Tensor:
        """A layer's payload on the device, uint8 ``[num_bytes]``."""
        return self.qkv.device[: call.payload.nbytes]

    def fill(self, step: StepMetadata) -> None:
        # A layer that only stores is not waited for by ``finish``.
        self.received.synchronize()
        super().fill(step)
        for mirror in (self.qkv, self.out, self.lse):
            mirror.reserve(max(step.num_tokens, step.num_query_rows))
        self.launches.forget()
        # What used this memory before is queued on the compute stream.
        self.consumed.record()


class CudaDecodeAttention(
    TritonKernels[_CudaKernelPlan], SharedRowsAttention[Pool, _CudaKernelPlan]
):
    """The Triton kernels on one GPU."""

    copies_rows = True
    #: A GPU stores as much in a fraction of a millisecond.
    store_bytes = 256 << 20

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.shared_device = CudaDevice(device)
        self._compute = torch.cuda.Stream(device)
        self._copy_in = torch.cuda.Stream(device)
        self._copy_out = torch.cuda.Stream(device)

    def allocate(self, num_bytes: int) -> CudaRegion:
        return CudaRegion(num_bytes, self.device)

    def poison(self, region: CudaRegion) -> None:
        region.bytes.fill_(0xFF)
        torch.cuda.synchronize(self.device)

    def view(self, region: CudaRegion, dtype: str) -> torch.Tensor:
        item_bytes = TORCH_DTYPES[dtype].itemsize
        whole = len(region) // item_bytes * item_bytes
        return region.bytes[:whole].view(TORCH_DTYPES[dtype])

    def plan(
        self,
        group: int,
        geometry: SessionGeometry,
        step: StepMetadata,
        previous: _CudaKernelPlan | None,
        *,
        on_half: bool = False,
    ) -> _CudaKernelPlan:
        # Memory is taken and filled in the order of the kernels that use it.
        torch.cuda.set_stream(self._compute)
        plan = previous or _CudaKernelPlan(group, geometry, self.device)
        plan.fill(step)
        return plan

    def begin(self, plan: _CudaKernelPlan, call: LayerCall) -> None:
        num_bytes = call.payload.nbytes
        host, device = plan.qkv.host[:num_bytes], plan.qkv.device[:num_bytes]
        # A layer that only stores is not waited for by ``finish``.
        plan.received.synchronize()
        host.copy_(torch.frombuffer(call.payload, dtype=torch.uint8))
        torch.cuda.set_stream(self._copy_in)
        self._copy_in.wait_event(plan.consumed)
        device.copy_(host, non_blocking=True)
        plan.received.record(self._copy_in)

    def store(
        self, pool: Pool, plan: _CudaKernelPlan, call: LayerCall, first: int, last: int
    ) -> None:
        torch.cuda.set_stream(self._compute)
        self._compute.wait_event(plan.received)
        rows, stream = plan.rows_of(call), self._compute.cuda_stream
        if last - first == call.layout.num_tokens:
            plan.launches.store(pool, plan, rows, call.layout, stream)
        else:
            elements = _elements(rows, pool)
            store_rows(pool, plan, elements, call.layout, slice(first, last))
        plan.consumed.record(self._compute)

    def attend(
        self, pool: Pool, plan: _CudaKernelPlan, call: LayerCall, slice_s: float = 0.0
    ) -> bool:
        if plan.num_done:
            # Others' kernels come between launches, if these wait for each other.
            plan.consumed.synchronize()
        torch.cuda.set_stream(self._compute)
        self._compute.wait_event(plan.received)
        rows, stream = plan.rows_of(call), self._compute.cuda_stream
        out, lse = plan.out.device, plan.lse.device
        plan.launches.attend(pool, plan, rows, call.layout, out, lse, stream)
        plan.consumed.record(self._compute)
        if plan.num_done:
            return False
        torch.cuda.set_stream(self._copy_out)
        self._copy_out.wait_event(plan.consumed)
        for mirror, target in _results(plan, call):
            size = target.nbytes
            mirror.host[:size].copy_(mirror.device[:size], non_blocking=True)
        plan.returned.record(self._copy_out)
        return True

    def finish(self, plan: _CudaKernelPlan, call: LayerCall) -> None:
        plan.returned.synchronize()
        for mirror, target in _results(plan, call):
            reply = torch.frombuffer(target, dtype=torch.uint8)
            reply.copy_(mirror.host[: target.nbytes])

    def attend_rows(
        self,
        pool: Pool,
        plan: _CudaKernelPlan,
        rows: torch.Tensor,
        layout: PayloadLayout,
        out: torch.Tensor,
    ) -> bool:
        is_first = plan.num_done == 0
        if not is_first:
            plan.consumed.synchronize()  # as in ``attend``
        torch.cuda.set_stream(self._compute)
        stream = self._compute.cuda_stream
        if is_first:
            plan.launches.store(pool, plan, rows, layout, stream)
        plan.launches.attend(pool, plan, rows, layout, out, plan.lse.device, stream)
        plan.consumed.record(self._compute)
        return plan.num_done == 0

    def finish_rows(self, plan: _CudaKernelPlan) -> None:
        plan.consumed.synchronize()


def _results(
    plan: _CudaKernelPlan, call: LayerCall
) -> list[tuple[_Mirror, memoryview]]:
    lse = [] if call.lse is None else [(plan.lse, call.lse)]
    return [(plan.out, call.out), *lse]


def _elements(data: torch.Tensor, pool: Pool) -> torch.Tensor:
    return data.view(pool.dtype)
