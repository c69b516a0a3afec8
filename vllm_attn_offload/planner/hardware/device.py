# SPDX-License-Identifier: Apache-2.0
"""A kind of device: its rates, as of the datasheet or measured, and its prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Price:
    """USD per device and hour, its source and the date of that."""

    usd_per_hour: float
    source: str
    date: str


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or CPU host.

    Attributes:
        tflops: Dense BF16, 1e12 flop/s.
        memory_gb: 1e9 bytes.
        memory_gbps: 1e9 bytes/s.
        source: Origin of the figures.
        date: Day of the figures.
        link_gbps: 1e9 bytes/s in one direction, between devices of one host.
        link_latency_us: One hop inside a host. The default is an assumption.
        power_w: Watts.
        compute_efficiency: Share of ``tflops`` that GEMMs reach (assumption).
        memory_efficiency: Share of ``memory_gbps`` that GEMMs reach (assumption).
        attention_efficiency: Share of ``memory_gbps`` that attention reaches; Lamina
            (arXiv 2405.01814) Figure 3.
        step_overhead_us: Scheduling and sampling, per step.
        row_overhead_us: Scheduling and sampling, per request of a step.
        layer_overhead_us: Per layer, on the device that computes it.
        attention_call_us: Per layer, on the device that attends.
        attention_row_us: Per layer and request, on the device that attends.
        attention_gbps: Measured 1e9 bytes/s of KV; replaces the efficiency.
        attention_tflops: Measured 1e12 flop/s of attention.
        gemm_curve: Measured (rows, seconds per 1e9 bytes of weights), rows rising;
            replaces the roofline of GEMMs.
        attention_only: A memory node that runs no model.
        price: Prices by the name of their list.
    """

    name: str
    tflops: float
    memory_gb: float
    memory_gbps: float
    source: str
    date: str
    link_gbps: float = 32.0
    link_latency_us: float = 2.0
    power_w: float | None = None
    compute_efficiency: float = 0.75
    memory_efficiency: float = 0.85
    attention_efficiency: float = 0.7
    step_overhead_us: float = 0.0
    row_overhead_us: float = 0.0
    layer_overhead_us: float = 0.0
    attention_call_us: float = 0.0
    attention_row_us: float = 0.0
    attention_gbps: float | None = None
    attention_tflops: float | None = None
    gemm_curve: tuple[tuple[float, float], ...] = ()
    attention_only: bool = False
    price: Mapping[str, Price] = field(default_factory=dict)

    def ideal(self) -> Device:
        """The datasheet roofline: every efficiency 1, no overheads, no measurements."""
        return Device(
            self.name,
            self.tflops,
            self.memory_gb,
            self.memory_gbps,
            self.source,
            self.date,
            self.link_gbps,
            link_latency_us=0.0,
            power_w=self.power_w,
            compute_efficiency=1.0,
            memory_efficiency=1.0,
            attention_efficiency=1.0,
            attention_only=self.attention_only,
            price=self.price,
        )

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
