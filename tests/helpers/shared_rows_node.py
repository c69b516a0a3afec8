# SPDX-License-Identifier: Apache-2.0
"""A memory node in this process whose device is host memory, and whose kernels lag."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from host_device import HostDevice

from vllm_attn_offload.memory_node.decode_attention.base import (
    LayerCall,
    SharedRowsAttention,
)
from vllm_attn_offload.memory_node.decode_attention.torch_attention import (
    TorchDecodeAttention,
)
from vllm_attn_offload.memory_node.server import MemoryNode
from vllm_attn_offload.protocol.layer import PayloadLayout
from vllm_attn_offload.transport.address import Address


class LaggingAttention(TorchDecodeAttention, SharedRowsAttention[Any, Any]):
    """Does nothing with shared rows until it is waited for.

    ``num_calls`` counts layers that came in device memory; with ``end_session`` the
    second one ends its session. A layer has ``num_launches``, each of them a turn.
    """

    def __init__(self) -> None:
        self.shared_device = HostDevice()
        self.num_calls = 0
        self.end_session = False
        self.num_launches = 1
        self._num_left = 0
        self._queued: Callable[[], None] | None = None

    def attend_rows(
        self,
        pool: Any,
        plan: Any,
        rows: torch.Tensor,
        layout: PayloadLayout,
        out: torch.Tensor,
    ) -> bool:
        self._num_left = (self._num_left or self.num_launches) - 1
        if self._num_left:
            return False
        out.fill_(0xFF)
        self.num_calls += 1

        def kernels() -> None:
            payload, target = rows.numpy().data, out.numpy().data
            call = LayerCall(payload, layout, target, None)
            self.store(pool, plan, call, 0, layout.num_tokens)
            self.attend(pool, plan, call)

        self._queued = kernels
        return True

    def finish_rows(self, plan: Any) -> None:
        assert self._queued is not None
        if self.end_session and self.num_calls > 1:
            raise ConnectionResetError("the session ends here")
        self._queued()
        self._queued = None


@contextmanager
def sharing_node(directory: Path) -> Iterator[tuple[str, LaggingAttention]]:
    """Its address, and its kernel."""
    attention = LaggingAttention()
    node = MemoryNode(
        [Address(path=str(directory / "node.sock"))], attention, "host", 64 << 20
    )
    node.start()
    try:
        yield str(node.address), attention
    finally:
        node.stop()
