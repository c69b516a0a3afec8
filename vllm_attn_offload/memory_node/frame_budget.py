# SPDX-License-Identifier: Apache-2.0
"""Memory that sessions need beside their blocks: frames under way, and plans."""

from __future__ import annotations

import threading

from vllm_attn_offload.memory_node.capacity import CapacityError
from vllm_attn_offload.protocol.messages import GIB

#: No engine takes more of what a node shares out than that.
ENGINE_SHARE = 0.75


class FrameBudget:
    """Splits memory for frames and plans between engines; safe for concurrent callers.

    Args:
        total_bytes: Budget of the node.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        #: By reservation: its engine, and what it holds.
        self._held: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """What no reservation holds."""
        with self._lock:
            return self.total_bytes - self._held_bytes()

    def hold(self, reservation: str, engine: str, num_bytes: int) -> None:
        """Hold more for a reservation.

        Raises:
            CapacityError: Less is free for its engine; the message has both numbers.
        """
        with self._lock:
            free = self._free(engine)
            if num_bytes > free:
                raise CapacityError(
                    f"{num_bytes / GIB:.2f} GiB for frames and plans were asked for, "
                    f"but {free / GIB:.2f} of the {self.total_bytes / GIB:.2f} GiB "
                    "that this node keeps for them are free for this engine. Lower "
                    "max_num_batched_tokens or max_num_seqs, stop another engine, or "
                    "start the node with a larger --kv-cache-gib."
                )
            _, held = self._held.get(reservation, (engine, 0))
            self._held[reservation] = engine, held + num_bytes

    def release(self, reservation: str) -> None:
        """Give back what a reservation holds; unknown names are ignored."""
        with self._lock:
            self._held.pop(reservation, None)

    def _free(self, engine: str) -> int:
        own = sum(held for owner, held in self._held.values() if owner == engine)
        share = int(ENGINE_SHARE * self.total_bytes)
        return max(0, min(self.total_bytes - self._held_bytes(), share - own))

    def _held_bytes(self) -> int:
        return sum(held for _, held in self._held.values())
