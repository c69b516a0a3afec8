# SPDX-License-Identifier: Apache-2.0
"""A number of devices of one kind, and their price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_attn_offload.planner.hardware.device import Device


@dataclass(frozen=True, slots=True)
class DeviceCount:
    """`count` devices of one kind, for example 2xH20."""

    device: Device
    count: int

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}"

    def split(self, parts: int) -> DeviceCount:
        """One of `parts` equal parts."""
        return DeviceCount(self.device, self.count // parts)


def common_price_list(devices: Sequence[Device]) -> str | None:
    """The first price list that prices every device, or None."""
    for name in devices[0].price if devices else ():
        if all(name in device.price for device in devices):
            return name
    return None


def total_price(parts: Sequence[DeviceCount], price_list: str | None) -> float | None:
    """USD per hour of all devices, or None if one of them has no price."""
    if not all(part.device.price for part in parts):
        return None
    return sum(part.count * part.device.usd_per_hour(price_list) for part in parts)
