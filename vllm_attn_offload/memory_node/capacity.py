# SPDX-License-Identifier: Apache-2.0
"""Who holds how much of a node's KV memory."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

from vllm_attn_offload.memory_node.memory_limits import memory_limits
from vllm_attn_offload.protocol.byte_size import byte_size


class CapacityError(RuntimeError):
    """More KV memory was asked for than is free."""


class CapacityLedger:
    """Splits a node's KV budget between engines; safe for concurrent callers.

    Args:
        total_bytes: Budget of the node.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """Bytes that no reservation holds."""
        with self._lock:
            return self._free()

    def reserve(self, reservation: str, num_bytes: int) -> None:
        """Hold ``num_bytes`` under the name ``reservation``.

        Raises:
            CapacityError: Less is free; the message has both numbers.
        """
        with self._lock:
            if num_bytes > self._free():
                raise CapacityError(
                    f"{byte_size(num_bytes)} of KV cache were asked for, but only "
                    f"{byte_size(self._free())} of {byte_size(self.total_bytes)} are "
                    "free. Lower kv_cache_gib, stop another engine of this node, or "
                    "start the node with a larger --kv-cache-gib."
                )
            self._held[reservation] = num_bytes

    def release(self, reservation: str) -> None:
        """Give a reservation back; unknown names are ignored."""
        with self._lock:
            self._held.pop(reservation, None)

    def _free(self) -> int:
        return self.total_bytes - sum(self._held.values())


def available_host_bytes(
    cgroups: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> int:
    """Host memory that this process may still take, by the kernel and its groups.

    Args:
        cgroups: As of `memory_limits`.
        groups: Likewise.
    """
    limits = (each.free_bytes for each in memory_limits(cgroups, groups))
    return min([psutil.virtual_memory().available, *limits])
