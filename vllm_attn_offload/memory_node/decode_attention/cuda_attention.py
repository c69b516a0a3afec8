# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels over blocks in GPU memory. Has not run on a GPU yet.

Kernels of all sessions run in order on one stream; rows and results cross the bus on
two others, through pinned memory, or stay in memory that the worker maps. ``finish``
waits, without the node's lock: another session's kernels run while rows come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_attn_offload.memory_node.decode_attention.base import SharedRowsAttention
from vllm_attn_offload.memory_node.decode_attention.triton_attention import (
    TORCH_DTYPES,
    Pool,
    StepPlan,
    TritonDecodeAttention,
    attend_rows,
    store_rows,
)
from vllm_attn_offload.protocol.layer import PayloadLayout, TokenLayout
from vllm_attn_offload.protocol.messages import SessionGeometry
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


@dataclass(frozen=True, slots=True)
class _Mirror:
    """The same bytes in pinned and in GPU memory."""

    host: torch.Tensor
    device: torch.Tensor

    @classmethod
    def of(cls, num_bytes: int, device: torch.device) -> _Mirror:
        return cls(
            torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True),
            torch.empty(num_bytes, dtype=torch.uint8, device=device),
        )


@dataclass(frozen=True, slots=True)
class _CudaPlan(StepPlan):
    """A step, with room for the rows and results of its largest layer."""

    qkv: _Mirror
    out: _Mirror
    lse: _Mirror
    received: torch.cuda.Event
    consumed: torch.cuda.Event
    returned: torch.cuda.Event


class CudaDecodeAttention(TritonDecodeAttention, SharedRowsAttention):
    """The Triton kernels on one GPU.

    ``attend`` uses the rows that ``store`` has brought to the GPU just before.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.shared_device = CudaDevice(device)
        self._compute = torch.cuda.Stream(device)
        self._copy_in = torch.cuda.Stream(device)
        self._copy_out = torch.cuda.Stream(device)

    def allocate(self, num_bytes: int) -> CudaRegion:
        return CudaRegion(num_bytes, self.device)

    def poison(self, region: Any) -> None:
        assert isinstance(region, CudaRegion)
        region.bytes.fill_(0xFF)
        torch.cuda.synchronize(self.device)

    def view(self, region: Any, dtype: str) -> torch.Tensor:
        assert isinstance(region, CudaRegion)
        item_bytes = TORCH_DTYPES[dtype].itemsize
        whole = len(region) // item_bytes * item_bytes
        return region.bytes[:whole].view(TORCH_DTYPES[dtype])

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def plan(
        self, group: int, geometry: SessionGeometry, step: StepMetadata
    ) -> _CudaPlan:
        layers = [layer for layer in geometry.layers if layer.group == group]
        item_bytes = TORCH_DTYPES[geometry.dtype].itemsize
        rows = [TokenLayout.of(layer) for layer in layers]
        widths = (
            item_bytes * max(row.width for row in rows),
            item_bytes * max(row.out for row in rows),
            4 * max(layer.num_query_heads for layer in layers),
        )
        # Both torch allocators reuse memory of earlier steps: once per step, no layer
        # allocates any.
        with torch.cuda.stream(self._compute):
            plan = super().plan(group, geometry, step)
            num_rows = max(step.num_tokens, step.num_query_rows)
            qkv, out, lse = (
                _Mirror.of(num_rows * width, self.device) for width in widths
            )
            received, consumed, returned = (torch.cuda.Event() for _ in range(3))
            # What used this memory before is queued on the compute stream.
            consumed.record()
        return _CudaPlan(
            num_tokens=plan.num_tokens,
            num_query_rows=plan.num_query_rows,
            slot_mapping=plan.slot_mapping,
            block_table=plan.block_table,
            plans=plan.plans,
            qkv=qkv,
            out=out,
            lse=lse,
            received=received,
            consumed=consumed,
            returned=returned,
        )

    def store(
        self, pool: object, plan: object, payload: memoryview, layout: PayloadLayout
    ) -> None:
        assert isinstance(pool, Pool)
        assert isinstance(plan, _CudaPlan)
        num_bytes = payload.nbytes
        host, device = plan.qkv.host[:num_bytes], plan.qkv.device[:num_bytes]
        # A layer that only stores is not waited for by ``finish``.
        plan.received.synchronize()
        host.copy_(torch.frombuffer(payload, dtype=torch.uint8))
        with torch.cuda.stream(self._copy_in):
            self._copy_in.wait_event(plan.consumed)
            device.copy_(host, non_blocking=True)
            plan.received.record()
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(plan.received)
            store_rows(pool, plan, _elements(device, pool), layout)
            plan.consumed.record()

    def attend(
        self,
        pool: object,
        plan: object,
        payload: memoryview,
        layout: PayloadLayout,
        out: memoryview,
        lse: memoryview | None,
    ) -> None:
        assert isinstance(pool, Pool)
        assert isinstance(plan, _CudaPlan)
        heads = (plan.num_query_rows, pool.shape.num_query_heads)
        lse_bytes = 4 * heads[0] * heads[1]
        with torch.cuda.stream(self._compute):
            attend_rows(
                pool,
                plan,
                _elements(plan.qkv.device[: payload.nbytes], pool),
                layout,
                _elements(plan.out.device[: out.nbytes], pool).view(*heads, -1),
                plan.lse.device[:lse_bytes].view(torch.float32).view(heads),
            )
            plan.consumed.record()
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(plan.consumed)
            for mirror, target in _results(plan, out, lse):
                size = target.nbytes
                mirror.host[:size].copy_(mirror.device[:size], non_blocking=True)
            plan.returned.record()

    def finish(self, plan: object, out: memoryview, lse: memoryview | None) -> None:
        assert isinstance(plan, _CudaPlan)
        plan.returned.synchronize()
        for mirror, target in _results(plan, out, lse):
            reply = torch.frombuffer(target, dtype=torch.uint8)
            reply.copy_(mirror.host[: target.nbytes])

    def attend_rows(
        self,
        pool: object,
        plan: object,
        rows: torch.Tensor,
        layout: PayloadLayout,
        out: torch.Tensor,
    ) -> None:
        assert isinstance(pool, Pool)
        assert isinstance(plan, _CudaPlan)
        heads = (plan.num_query_rows, pool.shape.num_query_heads)
        lse = plan.lse.device[: 4 * heads[0] * heads[1]].view(torch.float32)
        elements = _elements(rows, pool)
        with torch.cuda.stream(self._compute):
            store_rows(pool, plan, elements, layout)
            attend_rows(
                pool,
                plan,
                elements,
                layout,
                _elements(out, pool).view(*heads, -1),
                lse.view(heads),
            )
            plan.consumed.record()

    def finish_rows(self, plan: object) -> None:
        assert isinstance(plan, _CudaPlan)
        plan.consumed.synchronize()


def _results(
    plan: _CudaPlan, out: memoryview, lse: memoryview | None
) -> list[tuple[_Mirror, memoryview]]:
    return [(plan.out, out)] + ([] if lse is None else [(plan.lse, lse)])


def _elements(data: torch.Tensor, pool: Pool) -> torch.Tensor:
    return data.view(pool.key.dtype)
