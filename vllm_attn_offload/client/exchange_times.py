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
