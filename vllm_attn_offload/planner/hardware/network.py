# SPDX-License-Identifier: Apache-2.0
"""A network port of a device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Network:
    """One port, in each direction.

    `gbps` is 1e9 *bits* per second, `latency_us` one round trip, `efficiency` the share
    of `gbps` that transfers reach. Defaults: NCCL on 400 Gbps in Lamina (arXiv
    2405.01814v2) section 5, 66.6 us and 35.5 of 50 GB/s.
    """

    name: str
    gbps: float
    latency_us: float = 66.6
    efficiency: float = 0.71
    source: str = ""
    date: str = ""

    @property
    def bytes_per_s(self) -> float:
        """Usable bytes per second of one port in one direction."""
        return self.gbps * 1e9 / 8 * self.efficiency
