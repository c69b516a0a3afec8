# SPDX-License-Identifier: Apache-2.0
"""Who holds how much of a node's KV memory."""

from __future__ import annotations

import threading

GIB = 1 << 30


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
                    f"{num_bytes / GIB:.2f} GiB of KV cache were asked for, but only "
                    f"{self._free() / GIB:.2f} of {self.total_bytes / GIB:.2f} GiB are "
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
