# SPDX-License-Identifier: Apache-2.0
"""Steps of ``gpu_suite.py`` beyond kernels: the way of a layer's rows, a node."""

from __future__ import annotations

import importlib.util
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from harness.memory_node import NodeProcess

if TYPE_CHECKING:
    from vllm_attn_offload.transport.socket_transport import SocketTransport

#: Rows of one layer: one token of a small model up to a batch of 256 of a 70B one.
MESSAGE_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)
NODE_PACKAGES = ("msgspec", "psutil", "prometheus_client")


def missing(names: tuple[str, ...]) -> str:
    """The packages that are not installed, for a skip's reason."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def measure_transports(device: torch.device, *, is_dry: bool) -> dict[str, Any]:
    """Round trips of equal messages over loopback, and copies to and from the device.

    Median and p20/p80 in microseconds. A layer's rows go device → host → wire →
    host → device and come back alike, so the columns add up.
    """
    sizes = MESSAGE_BYTES[:2] if is_dry else MESSAGE_BYTES
    rows: list[dict[str, Any]] = [
        {"bytes": size, **_measure_copies(size, device)} for size in sizes
    ]
    reason = missing(("msgspec",))
    for family in () if reason else ("unix", "tcp"):
        for row in rows:
            repeats = 5 if is_dry else max(20, (1 << 26) // row["bytes"] // 8)
            row[f"{family}_us"] = _measure_round_trip(family, row["bytes"], repeats)
    _print_transports(rows, reason)
    return {"rows": rows} | ({"sockets_skipped": reason} if reason else {})


def _measure_copies(size: int, device: torch.device) -> dict[str, list[float]]:
    on_gpu = device.type == "cuda"
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
    there = torch.zeros(size, dtype=torch.uint8, device=device)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(device)

    return {
        "to_device_us": _repeat(lambda: copy(there, host), 50),
        "from_device_us": _repeat(lambda: copy(host, there), 50),
    }


def _measure_round_trip(family: str, size: int, repeats: int) -> list[float]:
    """The project's own transport; the other end is a process, as a node is."""
    from vllm_attn_offload.protocol.frames import FrameHeader, FrameKind
    from vllm_attn_offload.transport.socket_transport import SocketTransport

    ours, theirs = _connected(family)
    child = os.fork()
    if child == 0:
        # Only echoes: no kernel, no CUDA call, and no cleanup that the parent owns.
        ours.close()
        try:
            _echo(SocketTransport(theirs, stall_timeout_s=10))
        finally:
            os._exit(0)
    theirs.close()
    transport = SocketTransport(ours, stall_timeout_s=10)
    header, payload = FrameHeader(), memoryview(bytearray(size))

    def round_trip() -> None:
        header.kind, header.num_bytes = FrameKind.LAYER, size
        transport.send(header, payload)
        transport.receive_header(header, 10)
        transport.receive_payload(header.num_bytes)

    try:
        return _repeat(round_trip, repeats)
    finally:
        transport.close()
        os.waitpid(child, 0)


def _connected(family: str) -> tuple[socket.socket, socket.socket]:
    if family == "unix":
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for end in (ours, theirs):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def _echo(transport: SocketTransport) -> None:
    from vllm_attn_offload.protocol.frames import FrameHeader

    header = FrameHeader()
    while True:
        transport.receive_header(header, None)
        transport.send(header, transport.receive_payload(header.num_bytes))


def _repeat(call: Callable[[], object], repeats: int) -> list[float]:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    times.sort()
    return [
        statistics.median(times),
        times[len(times) // 5],
        times[4 * len(times) // 5],
    ]


def _print_transports(rows: list[dict[str, Any]], reason: str) -> None:
    names = ("to_device_us", "from_device_us", "unix_us", "tcp_us")
    print(f"{'bytes':>12}" + "".join(f"{name:>16}" for name in names))
    for row in rows:
        cells = [f"{row[name][0]:.1f}" if name in row else "-" for name in names]
        print(f"{row['bytes']:12,}" + "".join(f"{cell:>16}" for cell in cells))
    if reason:
        print(f"sockets: {reason}")


@contextmanager
def memory_node(
    work: str,
    device: torch.device,
    *,
    kv_cache_gib: float,
    name: str,
    logs: Path | None = None,
) -> Iterator[str]:
    """A node on ``device``; yields its address. Logs go to ``work`` by default."""
    where = f"cuda:{device.index or 0}" if device.type == "cuda" else "cpu"
    node = NodeProcess(
        f"unix:{work}/{name}.sock",
        (logs or Path(work)) / f"{name}.log",
        *("--kv-cache-gib", str(kv_cache_gib), "--device", where),
    )
    try:
        yield node.address
    finally:
        node.kill()
