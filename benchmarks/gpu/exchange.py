# SPDX-License-Identifier: Apache-2.0
"""A step of ``gpu_suite.py``: one layer's exchange by part, beside its bounds.

The classes are those of the worker; only the engine around them is missing. A
session's layer is attended again and again, so the node reads the same tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu.system import memory_node, missing

BLOCK_SIZE = 16
#: Requests and tokens of each: a decode step of one, and of larger batches.
POINTS = ((1, 512), (8, 512), (32, 2048), (128, 2048), (256, 512))
DRY_POINTS = ((2, 40),)
#: Beyond copies and attention, in microseconds. The same GPU serves twice: with rows
#: through the host, and in memory that both processes map.
BARS_US = {"cpu": 40.0, "gpu": 40.0, "shared": 15.0}


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

    def join(self) -> None:
        pass

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def device_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)


def measure_exchange(device: torch.device, *, is_dry: bool) -> dict[str, Any]:
    """Per layer and point: the whole, its parts, and what is left over."""
    reason = missing(("vllm", "msgspec", "psutil", "prometheus_client"))
    if reason:
        print(f"skipped: {reason}")
        return {"skipped": reason}
    rows = []
    print(f"{'node':<8}{'batch':>6}{'context':>9}{'layer us':>12}{'overhead us':>14}")
    with tempfile.TemporaryDirectory(prefix="attn-offload-exchange-") as work:
        for name in BARS_US:
            where = torch.device("cpu") if name == "cpu" else device
            gib = 0.1 if is_dry else 8.0
            with memory_node(work, where, kv_cache_gib=gib, name=name) as address:
                for point in DRY_POINTS if is_dry else POINTS:
                    row = _measure(address, device, name, point, is_dry=is_dry)
                    rows.append({"node": name, "bar_us": BARS_US[name], **row})
                    print(
                        f"{name:<8}{row['batch']:6}{row['context']:9}"
                        f"{row['layer_us'][0]:12.1f}{row['overhead_us']:14.1f}",
                        flush=True,
                    )
    return {"rows": rows}


def _measure(
    address: str,
    device: torch.device,
    node: str,
    point: tuple[int, int],
    *,
    is_dry: bool,
) -> dict[str, Any]:
    from vllm_attn_offload.attention.cuda.exchange import DeviceExchange
    from vllm_attn_offload.attention.cuda.prefill import FlashPrefill
    from vllm_attn_offload.attention.cuda.streams import CudaStreams
    from vllm_attn_offload.attention.metadata import AttentionOffloadMetadata

    on_gpu = device.type == "cuda"
    is_shared = on_gpu and node == "shared"
    batch, context = point
    heads, kv_heads, size = (4, 2, 32) if is_dry else (32, 8, 128)
    num_blocks = batch * -(-context // BLOCK_SIZE)
    session = _Session(
        address,
        (heads, kv_heads, size),
        num_blocks,
        device if is_shared else None,
        is_dry=is_dry,
    )
    exchange = DeviceExchange(
        session.nodes,
        (lambda: CudaStreams(device)) if on_gpu else HostStreams,
        FlashPrefill(size) if on_gpu else _NoPrefill(),
    )
    dtype = torch.float32 if is_dry else torch.bfloat16
    rows = torch.randn(batch, (heads + 2 * kv_heads) * size, device=device).to(dtype)
    widths = [heads * size, kv_heads * size, kv_heads * size]
    q, k, v = (part.unflatten(1, (-1, size)) for part in rows.split(widths, dim=1))
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    metadata = AttentionOffloadMetadata(session.step(batch, context))

    def layer() -> None:
        exchange.attend(metadata, 0, (q, k, v), output, size**-0.5)
        if on_gpu:
            torch.cuda.current_stream(device).synchronize()

    repeats = 3 if is_dry else 60
    for _ in range(3):
        layer()
    before = session.node_times()
    times = _times_us(layer, repeats)
    after = session.node_times()
    parts = {
        f"node_{part}_us": 1e6 * (after[part] - before[part]) / repeats
        for part in before
    } | _copies(rows, output, repeats, is_shared=is_shared)
    exchange.close()
    session.close()
    known = parts["node_attend_us"] + parts["copy_out_us"] + parts["copy_back_us"]
    return {
        "batch": batch,
        "context": context,
        "transport": session.transport,
        "layer_us": times,
        "parts_us": parts,
        "bytes_out": rows.nbytes,
        "bytes_back": output.nbytes,
        "overhead_us": times[0] - known,
    }


def _copies(
    rows: torch.Tensor, output: torch.Tensor, repeats: int, *, is_shared: bool
) -> dict[str, float]:
    """Of the same bytes, alone: what the link takes, or the device's own memory."""
    on_gpu = rows.is_cuda
    found = {}
    for name, tensor in (("copy_out_us", rows), ("copy_back_us", output)):
        there = (
            torch.empty_like(tensor)
            if is_shared
            else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        )
        target, source = (there, tensor) if name == "copy_out_us" else (tensor, there)

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            target.copy_(source, non_blocking=True)
            if on_gpu:
                torch.cuda.current_stream().synchronize()

        found[name] = _times_us(copy, repeats)[0]
    return found


def _times_us(call: Callable[[], None], repeats: int) -> list[float]:
    """Median, p20 and p80."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - started))
    times.sort()
    return [statistics.median(times), times[repeats // 5], times[4 * repeats // 5]]


class _NoPrefill:
    """``LocalAttention`` of steps that only decode."""

    def attend(self, *_: Any) -> torch.Tensor:
        raise NotImplementedError

    def merge(self, *_: Any) -> None:
        raise NotImplementedError


class _Session:
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
        from vllm_attn_offload.client.control_client import ControlClient
        from vllm_attn_offload.client.node_client import NodeClient
        from vllm_attn_offload.client.partition import Partition
        from vllm_attn_offload.client.remote_attention import RemoteAttention
        from vllm_attn_offload.protocol.messages import (
            AttachSession,
            KVGroup,
            LayerGeometry,
            OpenSession,
            ReserveCapacity,
            SessionGeometry,
            Shard,
        )

        heads, kv_heads, size = shape
        layer = LayerGeometry("0", 0, 0, heads, kv_heads, size, size, size**-0.5)
        dtype, element = ("float32", 4) if is_dry else ("bfloat16", 2)
        geometry = SessionGeometry(dtype, [KVGroup(BLOCK_SIZE)], [layer])  # type: ignore[arg-type]
        block_bytes = 2 * kv_heads * size * element * BLOCK_SIZE
        self._control = ControlClient(address, 30)
        reserved = self._control.reserve(
            ReserveCapacity("suite", Shard(), geometry, 2 * num_blocks * block_bytes)
        )
        opened = self._control.open_session(
            OpenSession(reserved.reservation, 0, num_blocks, 512, 512, num_blocks)
        )
        request = AttachSession(
            opened.session, opened.attach_token, 0, geometry.digest(), 0
        )
        shared = None
        if device is not None:
            from vllm_attn_offload.transport.cuda_memory import CudaDevice

            shared = CudaDevice(device)
        client = NodeClient(address, request, 30, device=shared)
        self.transport = client.transport_name
        if shared is not None and self.transport != "device memory":
            raise RuntimeError(f"rows were to be shared, and pass {self.transport}")
        self.nodes = RemoteAttention(
            [client], Partition("heads", (num_blocks,)), geometry
        )

    def step(self, batch: int, context: int) -> Any:
        """A decode step: every request has its own blocks, in random order."""
        from vllm_attn_offload.client.step_partition import BatchStep

        width = -(-context // BLOCK_SIZE)
        order = np.random.default_rng(0).permutation(batch * width)
        table = order.reshape(batch, width).astype(np.int32)
        last = (context - 1) % BLOCK_SIZE
        return BatchStep(
            query_start_loc=np.arange(batch + 1, dtype=np.int32),
            seq_lens=np.full(batch, context, np.int32),
            slot_mapping=table[:, -1].astype(np.int64) * BLOCK_SIZE + last,
            block_table=table,
        )

    def node_times(self) -> dict[str, float]:
        """Sums of the node, in seconds."""
        (session,) = self._control.stats().sessions
        names = ("receive", "store", "attend", "send")
        return {name: getattr(session, f"{name}_s") for name in names}

    def close(self) -> None:
        """Give the memory back."""
        self.nodes.close()
        self._control.close()
