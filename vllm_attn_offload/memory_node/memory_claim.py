# SPDX-License-Identifier: Apache-2.0
"""How much memory a node promises, beside the promises of the host's other nodes."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field

from vllm_attn_offload.memory_node.capacity import CapacityError, available_host_bytes
from vllm_attn_offload.memory_node.extras import check_extra
from vllm_attn_offload.memory_node.promises import Promises
from vllm_attn_offload.protocol.byte_size import byte_size
from vllm_attn_offload.protocol.messages import GIB

#: Of unpromised memory: the host's is needed by others, a GPU serves nothing else.
_DEFAULT_SHARE = {"cpu": 0.5, "cuda": 0.9}


@dataclass(frozen=True, slots=True)
class MemoryClaim:
    """Memory that a node holds for engines, seen by others as long as this lives.

    Attributes:
        kv_bytes: Budget for KV blocks.
        available_bytes: What was free of the device's memory.
        promised_bytes: What other nodes have promised of that.
        unknown: Why ``promised_bytes`` is not known and counts as 0; empty: it is.
    """

    kv_bytes: int
    available_bytes: int
    promised_bytes: int
    unknown: str
    _promise: socket.socket | None = field(repr=False)

    def describe(self) -> str:
        """Say what is there, and how much of it others have promised."""
        promised = f"{byte_size(self.promised_bytes)} of them promised by other nodes"
        if self.unknown:
            promised = f"what other nodes have promised is unknown ({self.unknown})"
        return f"{byte_size(self.available_bytes)} are available, {promised}"

    def warning(self) -> str:
        """Say that the promises of this host cannot all be kept; empty if they can."""
        excess = self.kv_bytes + self.promised_bytes - self.available_bytes
        if excess <= 0:
            return ""
        return (
            f"--kv-cache-gib {self.kv_bytes / GIB:g} and the "
            f"{byte_size(self.promised_bytes)} that other memory nodes of this host "
            f"have promised are {byte_size(excess)} more than what is available. "
            "Allowed, but nodes are killed when engines use all of it. Lower "
            "--kv-cache-gib, or stop another node."
        )


def claim_memory(kv_cache_gib: float | None, device: str) -> MemoryClaim:
    """Promise memory to engines.

    Args:
        kv_cache_gib: Given by the user; None: a share of what nobody has promised.
        device: ``cpu`` or ``cuda:N``.

    Raises:
        CapacityError: There is less, or no such device.
    """
    available, total, name = _memory(device)
    promises = Promises()
    with contextlib.ExitStack() as locked:
        promised, unknown = 0, ""
        try:
            locked.enter_context(promises.lock())
            if device == "cpu":
                promised = promises.untouched_bytes()
            else:  # Free memory lacks what others have taken of their promises.
                unpromised = total - promises.promised_bytes(name)
                promised = max(0, available - max(0, unpromised))
        except OSError as error:
            unknown = error.strerror or str(error)
        kv_bytes = _kv_bytes(kv_cache_gib, device, available, promised)
        try:
            promise = promises.add(name, kv_bytes)
        except OSError as error:
            promise, unknown = None, unknown or error.strerror or str(error)
        return MemoryClaim(kv_bytes, available, promised, unknown, promise)


def unpromised_host_bytes() -> int:
    """Memory of this host that is available and that no node has promised."""
    available = available_host_bytes()
    with contextlib.suppress(OSError):
        return max(0, available - Promises().untouched_bytes())
    return available


def _kv_bytes(
    kv_cache_gib: float | None, device: str, available: int, promised: int
) -> int:
    if kv_cache_gib is None:
        share = _DEFAULT_SHARE[device.partition(":")[0]]
        kv_bytes = int((available - promised) * share)
        if kv_bytes <= 0:
            raise CapacityError(
                f"other memory nodes of this host have promised all of the "
                f"{byte_size(available)} of memory that are available. Allowed without "
                "--kv-cache-gib: half of what is left. Stop another node, or give "
                "--kv-cache-gib."
            )
        return kv_bytes
    kv_bytes = int(kv_cache_gib * GIB)
    if kv_bytes > available:
        raise CapacityError(
            f"--kv-cache-gib {kv_cache_gib:g} is more than the "
            f"{available / GIB:.2f} GiB of memory that are available. Lower it or "
            "stop other processes."
        )
    return kv_bytes


def _memory(device: str) -> tuple[int, int, str]:
    """Bytes that are free, bytes in all, and a name that all processes agree on."""
    if device == "cpu":
        available = available_host_bytes()
        return available, available, device
    try:
        check_extra("gpu-node", f"--device {device}", "--device cpu")
    except ValueError as error:
        raise CapacityError(str(error)) from error
    import torch

    present = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device not in present:
        raise CapacityError(
            f"--device {device} is not on this host. Allowed here: "
            f"{', '.join(['cpu', *present])}. Choose one of them, or install torch "
            "for CUDA and check nvidia-smi."
        )
    free_bytes, total_bytes = torch.cuda.mem_get_info(torch.device(device))
    name = str(torch.cuda.get_device_properties(device).uuid)
    return int(free_bytes), int(total_bytes), name
