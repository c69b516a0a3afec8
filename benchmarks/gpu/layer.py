# SPDX-License-Identifier: Apache-2.0
"""One attention layer on one memory node, with the classes of a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_attn_offload.attention.cuda.exchange import CudaExchange
from vllm_attn_offload.attention.cuda.prefill import FlashPrefill
from vllm_attn_offload.attention.cuda.streams import CudaStreams
from vllm_attn_offload.attention.layer_attention import LayerAttention
from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata
from vllm_attn_offload.attention.readback import HostStep
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.client.partition import Partition
from vllm_attn_offload.client.remote_attention import RemoteAttention
from vllm_attn_offload.protocol.geometry import (
    KVGroup,
    LayerGeometry,
    SessionGeometry,
)
from vllm_attn_offload.protocol.messages import (
    AttachSession,
    OpenSession,
    ReserveCapacity,
    Shard,
)
from vllm_attn_offload.protocol.step import StepMetadata
from vllm_attn_offload.transport.cuda_memory import CudaDevice

BLOCK_SIZE = 16


class OneLayer:
    """A decode step's layer that can be attended again and again.

    Args:
        address: The memory node.
        device: Device of q, k, v and the output.
        point: Number of requests, and tokens of each.
        shares: Rows must stay in memory that both processes map.
        is_dry: A tiny model in fp32.
    """

    def __init__(
        self,
        address: str,
        device: torch.device,
        point: tuple[int, int],
        *,
        shares: bool,
        is_dry: bool,
    ) -> None:
        (self.batch, self.context), self.is_shared = point, shares
        self._device = device
        heads, kv_heads, size = shape = (4, 2, 32) if is_dry else (32, 8, 128)
        num_blocks = self.batch * -(-self.context // BLOCK_SIZE)
        shared_device = device if shares else None
        self.session = Session(address, shape, num_blocks, shared_device, is_dry=is_dry)
        self._exchange = _open_exchange(self.session, device)
        dtype = torch.float32 if is_dry else torch.bfloat16
        width = (heads + 2 * kv_heads) * size
        self.rows = torch.randn(self.batch, width, device=device).to(dtype)
        widths = [heads * size, kv_heads * size, kv_heads * size]
        parts = self.rows.split(widths, dim=1)
        query, key, value = (part.unflatten(1, (-1, size)) for part in parts)
        self._qkv = query, key, value
        self.output = self.rows.new_empty(self.batch, heads, size)
        self._metadata = AttentionOffloadMetadata(
            HostStep(self.session.step(*point)), BLOCK_SIZE
        )
        self._attention = LayerAttention(size**-0.5)

    def attend(self) -> None:
        """Send the rows, wait for the output."""
        self._exchange.attend(
            self._metadata, 0, self._qkv, self.output, self._attention
        )
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """End the session."""
        self._exchange.close()
        self.session.close()


class Session:
    """One layer on one node; with a ``device`` its rows stay there."""

    def __init__(
        self,
        address: str,
        shape: tuple[int, int, int],
        num_blocks: int,
        device: torch.device | None,
        *,
        is_dry: bool,
    ) -> None:
        geometry, block_bytes = _geometry(shape, is_dry=is_dry)
        self._control = ControlClient(address, 30)
        client = self._attach(address, geometry, num_blocks, block_bytes, device)
        self.transport = client.transport_name
        if device is not None and self.transport != "device memory":
            raise RuntimeError(f"rows were to be shared, and pass {self.transport}")
        self.nodes = RemoteAttention(
            [client], Partition("heads", (num_blocks,)), geometry
        )

    def _attach(
        self,
        address: str,
        geometry: SessionGeometry,
        num_blocks: int,
        block_bytes: int,
        device: torch.device | None,
    ) -> NodeClient:
        """Reserve blocks twice, because kernels may pad them, and open a channel."""
        reserved = self._control.reserve(
            ReserveCapacity("suite", Shard(), geometry, 2 * num_blocks * block_bytes)
        )
        opened = self._control.open_session(
            OpenSession(reserved.reservation, 0, num_blocks, 512, 512, num_blocks)
        )
        request = AttachSession(
            opened.session, opened.attach_token, 0, geometry.digest(), 0
        )
        shared = None if device is None else CudaDevice(device)
        return NodeClient(address, request, 30, device=shared)

    def step(self, batch: int, context: int) -> StepMetadata:
        """A decode step: every request has its own blocks, in random order."""
        width = -(-context // BLOCK_SIZE)
        order = np.random.default_rng(0).permutation(batch * width)
        table = order.reshape(batch, width).astype(np.int32)
        last = (context - 1) % BLOCK_SIZE
        return StepMetadata.whole(
            query_start_loc=np.arange(batch + 1, dtype=np.int32),
            seq_lens=np.full(batch, context, np.int32),
            slot_mapping=table[:, -1].astype(np.int64) * BLOCK_SIZE + last,
            block_table=table,
        )

    def node_times(self) -> dict[str, float]:
        """Sums of the node, in seconds."""
        (session,) = self._control.stats().sessions
        names = ("receive", "store", "attend", "send")
        return {name: getattr(session.counters, f"{name}_s") for name in names}

    def close(self) -> None:
        """Give the memory back."""
        self.nodes.close()
        self._control.close()


class HostStreams:
    """``DeviceStreams`` where the device is the host: everything is done at once."""

    def launch(self, kernels: Callable[[], object]) -> None:
        kernels()

    def fork(self) -> None:
        pass

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def mark(self) -> HostStreams:
        return self

    def wait(self) -> None:
        pass

    def computed(self) -> HostStreams:
        return self

    def join(self) -> None:
        pass

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def device_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)


class _NoPrefill:
    """``LocalAttention`` of steps that only decode."""

    def attend(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError

    def merge(self, *_: Any) -> None:
        raise NotImplementedError

    def add_sinks(self, *_: Any) -> None:
        raise NotImplementedError


def _open_exchange(session: Session, device: torch.device) -> CudaExchange:
    if device.type == "cuda":
        return CudaExchange(session.nodes, lambda: CudaStreams(device), FlashPrefill())
    return CudaExchange(session.nodes, HostStreams, _NoPrefill())


def _geometry(
    shape: tuple[int, int, int], *, is_dry: bool
) -> tuple[SessionGeometry, int]:
    """Geometry of a session with one layer, and the bytes of one block."""
    heads, kv_heads, size = shape
    layer = LayerGeometry("0", 0, 0, heads, kv_heads, size, size, size**-0.5)
    dtype, element = ("float32", 4) if is_dry else ("bfloat16", 2)
    geometry = SessionGeometry(dtype, [KVGroup(BLOCK_SIZE)], [layer])  # type: ignore[arg-type]
    return geometry, 2 * kv_heads * size * element * BLOCK_SIZE
