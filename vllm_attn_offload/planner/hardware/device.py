# SPDX-License-Identifier: Apache-2.0
"""A kind of device: its rates, as of the datasheet or measured, and its prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

EFFICIENCIES = ("compute_efficiency", "memory_efficiency", "attention_efficiency")
OVERHEADS = (
    *("step_overhead_us", "row_overhead_us", "layer_overhead_us"),
    *("attention_call_us", "attention_row_us", "link_latency_us"),
)


@dataclass(frozen=True, slots=True)
class Price:
    """USD per device and hour, its source and the date of that."""

    usd_per_hour: float
    source: str
    date: str


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or CPU host.

    Figures as of `source` and `date`: `tflops` of dense BF16 in 1e12 flop/s,
    `memory_gb` in 1e9 bytes, `memory_gbps` and `link_gbps` (one direction, inside a
    host) in 1e9 bytes/s, `link_latency_us` of one hop inside a host.
    Efficiencies are the reached share of a peak. Attention's 0.7 is Lamina (arXiv
    2405.01814) Figure 3; the other two, and the hop's 2 us, are assumptions.
    A measured device has `gemm_curve` (rows, seconds per 1e9 bytes of weights; rows
    rise) and `attention_gbps` (1e9 bytes/s of KV) instead.
    Overheads: per step and per request of it (scheduling, sampling), per layer on the
    device that computes it, per layer call and per request of it on the one that
    attends. `attention_only` marks a memory node that runs no model. `price` maps the
    names of price lists to prices.
    """

    name: str
    tflops: float
    memory_gb: float
    memory_gbps: float
    source: str
    date: str
    link_gbps: float = 32.0
    link_latency_us: float = 2.0
    compute_efficiency: float = 0.75
    memory_efficiency: float = 0.85
    attention_efficiency: float = 0.7
    step_overhead_us: float = 0.0
    row_overhead_us: float = 0.0
    layer_overhead_us: float = 0.0
    attention_call_us: float = 0.0
    attention_row_us: float = 0.0
    attention_gbps: float | None = None
    gemm_curve: tuple[tuple[float, float], ...] = ()
    attention_only: bool = False
    price: Mapping[str, Price] = field(default_factory=dict)

    def ideal(self) -> Device:
        """The datasheet roofline: every efficiency 1, no overheads, no measurements."""
        ideal: dict[str, Any] = dict.fromkeys(EFFICIENCIES, 1.0)
        ideal |= dict.fromkeys(OVERHEADS, 0.0)
        return replace(self, **ideal, attention_gbps=None, gemm_curve=())

    def usd_per_hour(self, price_list: str | None) -> float:
        """Price in `price_list`, or the first price where that list has none.

        Raises:
            ValueError: The device has no price.
        """
        if price_list is not None and price_list in self.price:
            return self.price[price_list].usd_per_hour
        if not self.price:
            raise ValueError(
                f"{self.name} has no price. Cost needs one price per device. Pass "
                f"--price {self.name}=USD_PER_HOUR or add it to your hardware file."
            )
        return next(iter(self.price.values())).usd_per_hour
