# SPDX-License-Identifier: Apache-2.0
"""Where the time of a worker's exchange with its nodes goes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ExchangeTimes:
    """Where a worker's time goes, summed over layers, in seconds."""

    num_steps: int = 0
    num_layer_calls: int = 0
    pack_s: float = 0.0
    send_s: float = 0.0
    wait_s: float = 0.0
    merge_s: float = 0.0

    def nanoseconds(self) -> tuple[int, int, int]:
        """Time of pack, send and wait as a STEP tells it."""
        return int(self.pack_s * 1e9), int(self.send_s * 1e9), int(self.wait_s * 1e9)
